"""Every recipe trains the weights that it trained before it was rewritten: five float32 steps, byte for byte.

`same_weights.json` holds the hashes of what the recipes of commit 6826cf7 trained on tiny models of their own
architecture, and once the QLoRA in bf16. Floats depend on the processor and on torch: the file also holds the hash of
a loop in plain PyTorch, and where that differs here, the recipes' hashes cannot be compared and the test is skipped.

    python tests/recipes/test_same_weights.py      # writes the file anew, for a change of the weights that is meant
"""

import hashlib
import json
import runpy
import signal
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    NanoChatConfig,
    NanoChatForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.helpers.runs import REPO

RECORDED = Path(__file__).with_name("same_weights.json")
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
    *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
# of each recipe: architecture, template, kind of rows, more flags
SEVEN_NAMES = ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BF16 = ["--dtype", "bfloat16", "--bf16", "true"]
RECIPES = {
    "qwen3_qlora": ("qwen3", "qwen3", "chats", SEVEN_NAMES),
    "qwen3_lora": ("qwen3", "qwen3", "chats", SEVEN_NAMES),
    "qwen3_full": ("qwen3", "qwen3", "chats", []),
    "blossom_stage1": ("qwen3", "chatml", "chats", []),
    "blossom_stage2": ("qwen3", "chatml", "chats", []),
    "smollm3_sft": ("smollm3", "smollm3", "chats", ["--max_length", "2048", "--pad_token", "<|endoftext|>"]),
    "smollm3_midtrain": ("smollm3", "chatml", "chats", ["--pad_token", "<|endoftext|>"]),
    "step35_sft": ("qwen3", "step3_qwen3", "packs", []),
    "nanochat_sft": ("nanochat", "nanochat", "chats", []),
    "nanochat_midtrain": ("nanochat", "nanochat", "chats", ["--max_length", "64"]),
}
CASES = {name: (name, []) for name in RECIPES} | {"qwen3_qlora in bf16": ("qwen3_qlora", BF16)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes and the special tokens of all templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_model(architecture: str, folder: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = SHAPE | ids | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=16))
    elif architecture == "smollm3":
        model = SmolLM3ForCausalLM(SmolLM3Config(**shape, num_key_value_heads=2))
    else:
        model = NanoChatForCausalLM(NanoChatConfig(**shape))
    model.save_pretrained(folder)


def write_rows(kind: str, path: Path) -> None:
    """Write 60 chats of one to three lines, or 12 packs of random tokens with boundaries and labels."""
    rows = []
    if kind == "chats":
        for number in range(60):
            question = f"What is {number} times {number % 7}?"
            answer = " and ".join([f"it is {number * (number % 7)}"] * (1 + number % 3))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": turns})
    else:
        generator = torch.Generator().manual_seed(1)
        for number in range(12):
            ids = torch.randint(0, 256, (40 + 5 * number,), generator=generator).tolist()
            labels = [token if place % 5 else -100 for place, token in enumerate(ids)]
            rows.append({"input_ids": ids, "labels": labels, "seq_lengths": [17 + number, len(ids) - 17 - number]})
    Dataset.from_list(rows).to_json(path)


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def hash_plain_torch(folder: Path) -> str:
    """Return the hash of weights after three steps of a loop that uses neither TRL nor this project."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for step in range(3):
        ids = torch.randint(0, 256, (1, 60 + 7 * step))
        loss = model(input_ids=ids, labels=ids).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss + model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return hash_tensors(model.state_dict())


def train(case: str, folder: Path, recipe: Path | None = None, flags: tuple = ()) -> str:
    """Run a recipe of RECIPES on its tiny model for five steps, here; return the hash of the weights that it saves."""
    name, case_flags = CASES[case]
    architecture, template, kind, recipe_flags = RECIPES[name]
    model, rows = folder / architecture, folder / f"{kind}.jsonl"
    if not model.is_dir():
        build_model(architecture, model)
    if not rows.is_file():
        write_rows(kind, rows)
    output = folder / f"{case} of {recipe.parent.name if recipe else 'the repository'}"
    eos_token = "<|assistant_end|>" if architecture == "nanochat" else "<|im_end|>"
    path = recipe or REPO / "recipes" / f"{name}.py"
    command = [path, "--use_cpu", "true", "--disable_tqdm", "true", "--output_dir", output]
    command += ["--model_name_or_path", model, "--eos_token", eos_token, "--dataset_name", rows]
    command += ["--chat_template_path", REPO / "chat_templates" / f"{template}.jinja"]
    if kind == "chats":
        command += ["--max_length", "256"]
    command += ["--dtype", "float32", "--bf16", "false", "--lora_dropout", "0", "--max_steps", "5"]
    command += ["--global_batch_size", "4", "--per_device_train_batch_size", "1", "--learning_rate", "1e-2"]
    command += ["--eval_rows", "8", "--eval_strategy", "no", "--save_strategy", "no"]
    command += [*recipe_flags, *case_flags, *flags]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with mock.patch("sys.argv", [*map(str, command)]), mock.patch("sys.path", list(sys.path)):
        runpy.run_path(str(path))["main"]()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    (weights,) = output.glob("*model.safetensors")
    return hash_tensors(load_file(weights))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    build_model("qwen3", folder)
    torch.set_num_threads(1)
    found = json.loads(RECORDED.read_text())
    if hash_plain_torch(folder) != found["plain torch"]:
        pytest.skip("plain PyTorch gives other floats on this processor than where the weights were recorded")
    return found["recipes"]


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_trains_the_recorded_weights(case, recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert train(case, tmp_path) == recorded[case]


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        hashes = {case: train(case, Path(folder)) for case in CASES}
        record = {"plain torch": hash_plain_torch(Path(folder) / "qwen3"), "recipes": hashes}
        RECORDED.write_text(json.dumps(record, indent=1) + "\n")
