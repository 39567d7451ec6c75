"""What eval.first_contact has done in processes of their own: torch is imported here alone.

    python -m eval.common.contact_child survey --out FOLDER --result FILE [--tiny]
    python -m eval.common.contact_child weights --out FOLDER --result FILE --model NAME
    python -m eval.common.contact_child packed --out FOLDER --result FILE --model NAME --attention NAME

Each writes what it found to --result, as JSON.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, utils

from data_prep.common.gpu_cards import find_device_card
from data_prep.common.gpu_configs import load_config
from data_prep.common.gpu_engines import Engine
from data_prep.common.gpu_memory import GIB, Prediction, predict
from data_prep.common.gpu_settings import PACKED_CONTEXT
from data_prep.common.gpu_speed import predict_speed
from data_prep.demo_model import SHAPE, TOKENS, train_tokenizer
from eval import fit
from eval.common.contact_plan import (
    ATTENTIONS,
    REPO,
    TINY,
    Predicted,
    Run,
    Survey,
    common_flags,
    list_runs,
    model_folder,
    recipe_path,
)

ROW_TOKENS = PACKED_CONTEXT  # what eval.fit assumes of rows in packs
TINY_ROW_TOKENS = 60
TRAINED_SHARE = 0.75  # of a row's tokens
ROWS = 600
TINY_ROWS = 40
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "triton")
GPU_PACKAGES = ("liger-kernel", "flash-attn", "kernels")


def survey_machine(out: Path, is_tiny: bool) -> dict:
    """Return the fields of a Survey; write each model's folder without its weights, and the rows."""
    runs = list_runs(is_tiny)
    tokenizer = make_tokenizer()
    for name in {run.model for run in runs}:
        write_config(model_folder(out, name), name, tokenizer)
    write_rows(out / "rows.jsonl", TINY_ROWS if is_tiny else ROWS, TINY_ROW_TOKENS if is_tiny else ROW_TOKENS)
    gpu = None
    gib = 0.0
    attention = "sdpa"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = properties.name
        gib = properties.total_memory / GIB
        attention = "flash_attention_2" if utils.is_flash_attn_2_available() else "flex_attention"
    predicted = {}
    if gpu:
        for run in runs:
            prediction = predict_run(run, out, attention)
            if prediction is not None:
                predicted[run.name] = describe_prediction(prediction, gpu, gib)
    survey = Survey(gpu, gib, read_driver(), attention, read_versions(), find_attentions(), predicted)
    return asdict(survey)


def predict_run(run: Run, out: Path, attention: str) -> Prediction | None:
    """Return eval.fit's prediction of a run as it is launched here; None where it has none, with a line why."""
    flags = common_flags(run, out)
    if run.attention is None:
        flags += ["--attn_implementation", attention]
    if not utils.is_liger_kernel_available():
        flags += ["--use_liger_kernel", "false"]
    assumed = argparse.Namespace(trained_share=TRAINED_SHARE, tokens_per_row=ROW_TOKENS)
    try:
        read = fit.read_run(recipe_path(run), flags, Engine(), assumed)
        return predict(read.settings, read.config, read.engine)
    except Exception as error:  # the run is measured all the same
        print(f"{run.name}: no prediction: {type(error).__name__}: {error}", flush=True)
        return None


def describe_prediction(prediction: Prediction, gpu: str, gib: float) -> Predicted:
    card = find_device_card(gpu)
    speeds = None
    if card is not None:
        speed = predict_speed(prediction, card)
        speeds = (speed.slow, speed.fast)
    return Predicted(prediction.peak / GIB, prediction.needed[0] / GIB, prediction.may_fit(gib), speeds)


def read_driver() -> str:
    """Return the version of NVIDIA's driver, "" where nvidia-smi does not say."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else ""


def read_versions() -> dict[str, str]:
    """Return the versions of python, CUDA and the packages that a run depends on, "none" where one is not there."""
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda or "none"}
    for name in PACKAGES + GPU_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    versions["torch"] = torch.__version__
    return versions


def find_attentions() -> dict[str, str]:
    """Return for each attention why it cannot be tried, "" where it can."""
    reasons = dict.fromkeys(ATTENTIONS, "")
    if not utils.is_flash_attn_2_available():
        reasons["flash_attention_2"] = "flash-attn is not installed, or not for this GPU"
    if not utils.is_flash_attn_3_available():
        reasons["flash_attention_3"] = "flash-attn 3 is not installed, or not for this GPU"
    if not utils.is_kernels_available():
        reasons["kernels-community/flash-attn2"] = "no `kernels` of the versions that transformers takes"
    return reasons


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with Qwen3's special tokens whose other tokens are bytes: a digit is a token."""
    return train_tokenizer([], 256 + len(TOKENS))


def write_config(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a model's folder as from_pretrained takes it, but for the weights."""
    if name == TINY:
        config = Qwen3Config(vocab_size=len(tokenizer), **SHAPE)
    else:
        config = load_config(name).config
    config.bos_token_id = None
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, count: int, mean_tokens: int) -> None:
    """Write rows of random digits, a token each, of half to one and a half times so many tokens."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            length = draw.randint(mean_tokens // 2, mean_tokens * 3 // 2)
            asked = round(length * (1 - TRAINED_SHARE))
            digits = "".join(draw.choices("0123456789", k=length))
            turns = [{"role": "user", "content": digits[:asked]}, {"role": "assistant", "content": digits[asked:]}]
            file.write(json.dumps({"messages": turns}) + "\n")


def write_weights(folder: Path) -> dict:
    """Write random weights to a model's folder, in bf16 and drawn on the GPU where there is one.

    A file for each decoder layer, so that a card draws the weights of a model that it holds in 4 bits only.
    """
    config = AutoConfig.from_pretrained(folder)
    device = torch.device("cpu")
    dtype = torch.float32
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]  # TRL loads the class that is named here
    config.save_pretrained(folder)
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, weight in model.named_parameters():  # a tied head is left out
        layer = re.search(r"\.layers\.(\d+)\.", name)
        groups.setdefault(layer[1] if layer else "rest", {})[name] = weight.shape
    torch.manual_seed(0)
    files = {}
    for group, shapes in groups.items():
        weights = {}
        for name, shape in shapes.items():
            weights[name] = torch.ones(shape, dtype=dtype, device=device)  # norms stay at one
            if len(shape) > 1:
                weights[name].normal_(std=config.initializer_range)
            files[name] = f"model-{group}.safetensors"
        save_file(weights, folder / f"model-{group}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(folder)
    return {"parameters": model.num_parameters()}


def measure_packing(folder: Path, attention: str) -> dict:
    """Return how far packed rows are from each row alone, hidden states and gradients, on a small copy of the model.

    Raises the model's own errors.
    """
    sys.path.insert(0, str(REPO / "recipes"))  # as the recipes import their hooks
    from hooks.checks import packing

    config = AutoConfig.from_pretrained(folder)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    probe = packing.probe_packing(config, attention, device)
    torch.manual_seed(0)
    documents = torch.randint(packing.FIRST_ID, packing.VOCABULARY, (2, packing.DOCUMENT_LENGTH))
    with torch.no_grad():
        found = packing.find_probe_model(config, attention, device, False, documents)
    alone = gradient(found.model, device, input_ids=documents)
    joined = gradient(found.model, device, input_ids=documents.view(1, -1))
    packed = gradient(found.model, device, **packing.pack_documents(documents))
    share = packing.LEAK_SHARE[found.dtype]
    gradient_gap = ((packed - alone).norm() / alone.norm()).item()
    gradient_joined = ((joined - alone).norm() / alone.norm()).item()
    return {
        "dtype": str(found.dtype).removeprefix("torch."),
        "gap": probe.gap,
        "joined_gap": probe.joined_gap,
        "gradient_gap": gradient_gap,
        "gradient_joined_gap": gradient_joined,
        "is_same": not probe.leaks and gradient_gap <= share * gradient_joined,
    }


def gradient(model: torch.nn.Module, device: torch.device, **inputs: torch.Tensor | int) -> torch.Tensor:
    """Return the gradient of a fixed weighted sum of the hidden states to all weights, (weights,) in float32."""
    for name, value in inputs.items():
        if torch.is_tensor(value):
            inputs[name] = value.to(device)
    hidden_states = model(**inputs, use_cache=False).last_hidden_state.float().flatten()
    weights = torch.linspace(-1, 1, len(hidden_states), device=device)
    weights = weights * torch.cos(37 * weights)  # no symmetry that a mistake could hide in
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad((hidden_states * weights).sum(), parameters, allow_unused=True)
    return torch.cat([value.float().flatten() for value in gradients if value is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["survey", "weights", "packed"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--attention")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.task == "survey":
        found = survey_machine(args.out, args.tiny)
    elif args.task == "weights":
        found = write_weights(model_folder(args.out, args.model))
    else:
        found = measure_packing(model_folder(args.out, args.model), args.attention)
    args.result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
