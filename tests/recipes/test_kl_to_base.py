"""--kl_weight: loss and gradient are those of a float64 reference with whole logits; what is logged; what is refused.

Breaks tried, each seen red: KL the other way round; the base with its adapters on; the term without its weight, over
all tokens, or divided by the micro-batch's tokens where the step's are known; added in an evaluation too; adapters left
in evaluation mode after the base's pass; dropout in that pass; scale or cap of the logits left out; states one off.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from hooks.kl_to_base import KLToBase, LogitForm, read_logit_form, refuse_engines
from hooks.messages import UsageError
from hooks.trainer import SFTTrainer
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig

from tests.helpers.engines import ENGINES, run
from tests.helpers.runs import EXACT, REPO
from tests.recipes.test_coverage import build_model, small_config

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
SIZES |= {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "attn_implementation": "sdpa"}


def make_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({f"t{number}": number for number in range(64)}, unk_token="t2"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1")


def make_rows(count=12, seed=0):
    """Tokens with labels on about half of them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        ids = torch.randint(3, 64, (9 + number % 5,), generator=generator)
        masked = torch.rand(len(ids), generator=generator) < 0.5
        masked[-1] = False
        rows.append({"input_ids": ids.tolist(), "labels": ids.masked_fill(masked, -100).tolist()})
    return Dataset.from_list(rows)


def make_trainer(folder, lora, rows=None, model=None, **values):
    """A trainer of these hooks on a small Qwen3, whose adapters are no zeros."""
    torch.manual_seed(0)
    model = model or Qwen3ForCausalLM(Qwen3Config(**SIZES))
    settings = {"bf16": False, "report_to": "none", "max_length": None, "per_device_train_batch_size": 3}
    settings |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "eval_strategy": "no", "save_strategy": "no"}
    settings |= {
        "use_cpu": True,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "remove_unused_columns": False,
    }
    adapters = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None
    args = SFTConfig(str(folder), **settings | values)
    rows = rows or make_rows()
    trainer = SFTTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, processing_class=make_tokenizer(), peft_config=adapters
    )
    trainer.current_gradient_accumulation_steps = 1
    if lora:
        with torch.no_grad():
            for name, weight in trainer.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.1)
    return trainer


def reference(trainer, batch, weight, tokens):
    """The loss by whole logits in float64, and its gradients; the base is what the weights were (full) or without
    adapters."""
    model = trainer.model.double()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    targets = batch["labels"][:, 1:]
    trained = targets != -100
    logits = model(**inputs).logits[:, :-1][trained]
    with torch.no_grad():
        if trainer.kl.base is not None:
            base = trainer.kl.base.double()  # not its forward: TRL has bound that to the model
            base_logits = base.lm_head(base.model(**inputs).last_hidden_state)[:, :-1][trained]
        else:
            with model.disable_adapter():
                base_logits = model(**inputs).logits[:, :-1][trained]
    own, base = logits.log_softmax(-1), base_logits.log_softmax(-1)
    divergence = (base.exp() * (base - own)).sum()
    nll = F.cross_entropy(logits, targets[trained], reduction="sum")
    loss = (nll + weight * divergence) / tokens
    names, weights = zip(*[(n, w) for n, w in model.named_parameters() if w.requires_grad], strict=True)
    return loss, nll, divergence, dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("items", [None, 40], ids=["mean", "of the step"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
def test_loss_and_gradient_are_those_of_float64(tmp_path, lora, items, checkpointing):
    trainer = make_trainer(tmp_path, lora, activation_checkpointing=checkpointing)
    trainer.kl = KLToBase(trainer, 0.7)
    if not lora:  # it has moved since
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.05)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(6)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    found = {name: weight.grad.double() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    sums = trainer.kl.sums["train"].double()
    tokens = items or int((batch["labels"][:, 1:] != -100).sum())
    trainer.model.zero_grad()
    expected, nll, divergence, gradients = reference(trainer, batch, 0.7, tokens)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6) and divergence > 0.01
    assert sums[0].item() == pytest.approx(divergence.item(), rel=1e-5)
    assert sums[1].item() == pytest.approx(nll.item(), rel=1e-6)
    assert found.keys() == gradients.keys()
    size = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 5e-6 * size, name


def test_dropout_is_the_model_s_not_the_base_s(tmp_path):
    """The base's pass draws no random numbers, and every module is in training mode again behind it."""
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, attention_dropout=0.3))
    trainer = make_trainer(tmp_path, True, model=model)
    trainer.kl = KLToBase(trainer, 1.0)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(4)])
    trainer.model.train()
    states = []
    with trainer.kl.watch():
        super(SFTTrainer, trainer).compute_loss(trainer.model, dict(batch))
    for _ in range(2):
        seen = dict(trainer.kl.seen)
        states.append(trainer.kl.base_states())
        trainer.kl.seen = seen
    assert torch.equal(*states)
    assert all(module.training for module in trainer.model.modules())
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, LoraLayer)]
    assert layers and not any(layer.disable_adapters for layer in layers)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "cohere2", "granite", "qwen3_5_text"])
def test_the_form_of_logits(kind):
    """Scaled and capped as the model's own forward does it."""
    more = {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 4.0}}
    model = build_model(small_config(kind, **more.get(kind, {})), "cpu").eval()
    ids = torch.randint(3, 99, (1, 7))
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        logits = read_logit_form(model.config).apply(model.get_output_embeddings()(hidden))
        assert torch.allclose(logits, model(ids).logits, atol=1e-6)
    form = read_logit_form(model.config)
    assert (form == LogitForm(1.0, None)) is (kind in ("llama", "qwen3_5_text"))


# -- a run ------------------------------------------------------------------------------------------------------------
def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_logs_both_parts_and_keeps_the_validation_loss_plain(run_recipe, tmp_path, capsys):
    flags = [*EXACT, "--eval_strategy", "steps", "--eval_steps", 4, "--load_in_4bit", "false"]
    plain = logged(run_recipe("qwen3_qlora", *flags, "--kl_weight", 0, out="plain"))
    held = logged(run_recipe("qwen3_qlora", *flags, "--kl_weight", 5, out="held"))
    steps = [line for line in held if "loss" in line]
    assert [line["loss"] for line in steps] == [pytest.approx(line["nll"] + 5 * line["kl"], rel=1e-4) for line in steps]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[3]["kl"] > 1e-5  # adapters begin as the base
    *_, validation = [line for line in held if "eval_loss" in line]
    assert validation["eval_nll"] == pytest.approx(validation["eval_loss"], rel=0.02) and validation["eval_kl"] > 1e-5
    assert not any("kl" in line for line in plain)
    out = capsys.readouterr().out
    assert "(nll " in out and f"perplexity {math.exp(validation['eval_loss']):.4g}" in out


@pytest.mark.long
def test_two_processes_train_what_one_does(demo, tmp_path):
    folders = []
    for engine in ("one", "ddp"):
        data = ["--model_name_or_path", demo / "init", "--dataset_name", demo / "rows" / "chat"]
        data += ["--chat_template_path", REPO / "chat_templates" / "qwen3.jinja", "--output_dir", tmp_path / engine]
        flags = ["--max_steps", 4, "--global_batch_size", 4, "--max_length", 512, "--learning_rate", "1e-2"]
        flags += ["--save_strategy", "no", "--eval_strategy", "no", "--kl_weight", 2, *EXACT]
        run(ENGINES[engine].command("qwen3_lora", *data, *flags))
        folders.append([line for line in logged(tmp_path / engine) if "kl" in line])
    for one, two in zip(*folders, strict=True):
        for name in ("loss", "nll", "kl"):
            assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-7)
    assert len(folders[0]) == 4 and folders[0][-1]["kl"] > 1e-4


# -- what it is for ---------------------------------------------------------------------------------------------------
def counting_rows(step, marker, count=64):
    """Rows that count on by a step behind a marker: 6 numbers, the last four are trained."""
    rows = []
    for number in range(count):
        ids = [marker] + [4 + (number + step * place) % 58 for place in range(6)]
        rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return Dataset.from_list(rows)


def loss_on(model, rows):
    model.eval()
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()


def test_the_base_s_task_is_kept_with_it_and_lost_without(tmp_path):
    """A small base counts by one behind either marker; then it is trained to count by two behind one of them."""
    torch.manual_seed(1)
    base = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    old, new = counting_rows(1, 3), counting_rows(2, 2)
    schedule = {"learning_rate": 5e-3, "lr_scheduler_type": "constant", "logging_steps": 50, "seed": 1}
    both = Dataset.from_list([*old, *counting_rows(1, 2)])
    first = make_trainer(tmp_path, False, both, base, max_steps=300, per_device_train_batch_size=32, **schedule)
    first.train()
    assert loss_on(base, old) < 0.1
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    lost = {}
    learnt = {}
    for weight in (0.0, 1.0):
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
        model.load_state_dict(weights)
        trainer = make_trainer(tmp_path, False, new, model, max_steps=60, per_device_train_batch_size=32, **schedule)
        if weight:
            trainer.kl = KLToBase(trainer, weight)
        trainer.train()
        lost[weight] = loss_on(model, old)
        learnt[weight] = loss_on(model, new)
    print(lost, learnt)
    assert lost[0.0] > 1 and lost[1.0] < lost[0.0] / 4
    assert learnt[1.0] < loss_on_fresh(weights, new) / 2


def loss_on_fresh(weights, rows):
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES))
    model.load_state_dict(weights)
    return loss_on(model, rows)


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["is_fsdp_enabled", "is_deepspeed_enabled", "get_sp_size", "get_cp_size", "get_tp_size"]
)
def test_engines_that_do_not_hold_a_whole_model_are_refused(name):
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False, model=None)
    for size in ("get_sp_size", "get_cp_size", "get_tp_size"):
        setattr(trainer, size, lambda: 1)
    refuse_engines(trainer)
    setattr(trainer, name, (lambda: 2) if name.startswith("get") else True)
    with pytest.raises(UsageError, match="--kl_weight: each process needs the whole model"):
        refuse_engines(trainer)


def test_a_head_of_its_own_is_refused(tmp_path):
    adapters = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    args = SFTConfig(
        str(tmp_path),
        bf16=False,
        use_cpu=True,
        report_to="none",
        max_length=None,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )
    trainer = SFTTrainer(
        Qwen3ForCausalLM(Qwen3Config(**SIZES)),
        args,
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=adapters,
    )
    with pytest.raises(UsageError, match="lm_head is in modules_to_save"):
        KLToBase(trainer, 1.0)
