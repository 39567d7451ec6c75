"""nanochat's SFT (November 2025): padded rows in their order, three learning rates, a mean of passes, no clipping.

    accelerate launch recipes/nanochat_sft.py
    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml recipes/nanochat_sft.py --dataset_name rows.jsonl
"""

import importlib.metadata
import json
import re
import runpy
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import ParallelismConfig
from datasets import load_dataset, load_from_disk
from transformers import AutoTokenizer
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser
from trl.chat_template_utils import has_generation_markers

HERE = Path(__file__).resolve()
TEMPLATES, HOOKS = HERE.parents[1] / "chat_templates", HERE.parent / "hooks"  # a copy passes --chat_template_path

DEFAULTS = dict(  # nanochat's values; which are ours: recipes/README.md
    model_name_or_path="runs/nanochat_midtrain", dtype="float32", eos_token="<|assistant_end|>",  # fp32 master weights
    dataset_name="data/nanochat_sft", dataset_test_split="validation", save_total_limit=2,  # the mix of this name
    chat_template_path=str(TEMPLATES / "nanochat.jinja"), assistant_only_loss=True, packing=False, max_length=2048,
    train_sampling_strategy="sequential", global_batch_size=32, per_device_train_batch_size=4, micro_batch_mean=True,
    optimizer=str(HERE.parent / "optimizers/nanochat.py"), learning_rate=0.02, whole_steps=True,  # times its 3 rates
    lr_scheduler_type="linear", weight_decay=0.0, max_grad_norm=0.0, num_train_epochs=1, logging_steps=1,  # no clipping
    output_dir=f"runs/{HERE.stem}", activation_checkpointing=True, save_steps=100, logging_nan_inf_filter=False,
    hooks=[str(HOOKS / f"{name}.py") for name in (  # safer and nicer, not needed
        "guard", "quiet", "preflight", "parity", "survive", "stop", "heartbeat", "log", "show", "memory", "end")],
)


def to_messages(row):
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}


# -- shared: the same in every recipe, at most 70 lines of code (tests/test_recipes.py) -------------------------------
@dataclass
class RecipeArguments(ScriptArguments):
    global_batch_size: int = field(default=16, metadata={"help": "rows or packs per optimizer step over all processes"})
    eval_rows: int = field(default=0, metadata={"help": "validation rows drawn by seed, where there is no such split"})
    skip_bad_rows: bool = field(default=False, metadata={"help": "go on without the rows that have no assistant turn"})
    hooks: list[str] = field(default_factory=list, metadata={"action": "extend", "help": "files, added to ours"})
    allow: list[str] = field(default_factory=list, metadata={"help": "what a hook would refuse, by the name it gives"})


def parse_args():
    parser = TrlParser((RecipeArguments, SFTConfig, ModelConfig), allow_abbrev=False, usage="%(prog)s [--name value]")
    plain = vars(parser.parse_args([])) | {"gradient_accumulation_steps": None}  # None, so that even a passed 1 is seen
    parser.add_argument("--config", help="YAML file of these names: DEFAULTS < YAML < flags")
    unknown = parser.set_defaults_with_config(**DEFAULTS, gradient_accumulation_steps=None)
    script, args, model, _ = parser.parse_args_and_config()
    script.resolved = {k: v for k, v in vars(parser.parse_args()).items() if k in DEFAULTS or v != plain.get(k, v)}
    out, template, resume = Path(args.output_dir), Path(str(args.chat_template_path)), str(args.resume_from_checkpoint)
    rows = args.per_device_train_batch_size * args.world_size // ParallelismConfig().non_data_parallel_size
    if reason := (
        unknown and f"DEFAULTS holds names that nobody knows: {unknown}"
        or args.gradient_accumulation_steps and "gradient_accumulation_steps is derived: pass --global_batch_size"
        or script.global_batch_size % rows and f"--global_batch_size must be a multiple of {rows}, the rows of one pass"
        or not (template.is_file() and (has_generation_markers(template.read_text()) or not args.assistant_only_loss))
        and f"--chat_template_path {template}: no such file, or no {{% generation %}} markers in it"
        or resume.lower() in ("none", "false") and out.is_dir() and any(out.iterdir())
        and f"{out} is in use: --resume_from_checkpoint true goes on there, another --output_dir starts afresh"
    ):
        parser.error(reason)
    # trainer_state.json is written last: a checkpoint whose save was cut short has none, or one without its end
    states = [path for path in out.glob("checkpoint-*/trainer_state.json") if path.read_text().endswith("\n}\n")]
    newest = max((str(path.parent) for path in states), key=lambda path: int(path.split("-")[-1]), default=None)
    args.resume_from_checkpoint = {"none": None, "false": None, "true": newest}.get(resume.lower(), resume)
    args.gradient_accumulation_steps = script.global_batch_size // rows
    cuda = torch.cuda.is_available() and not args.use_cpu
    args.use_liger_kernel &= cuda and is_liger_kernel_available()
    fast = "flash_attention_2" if is_flash_attn_2_available() else "flex_attention"
    chosen = {"dtype": model.dtype, "attn_implementation": model.attn_implementation or (fast if cuda else "sdpa")}
    args.model_init_kwargs = chosen | {"revision": model.model_revision} | (args.model_init_kwargs or {})
    return script, args, model


def load_data(script, args, model):
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    stops = args.eos_token, tokenizer.eos_token
    if tokenizer.pad_token in (None, stops[0] or stops[1]):  # padding that means stop gives empty answers once served
        tokenizer.pad_token = min(tokenizer.get_added_vocab(), key=lambda token: (token in stops, "pad" not in token))
    name, kind = script.dataset_name, Path(script.dataset_name).suffix[1:].replace("jsonl", "json")
    sets = load_from_disk(name) if Path(name).is_dir() else (
        load_dataset(kind, data_files={script.dataset_train_split: name}) if kind in ("json", "parquet") else
        load_dataset(name, script.dataset_config))
    train, held_out = sets[script.dataset_train_split], sets.get(script.dataset_test_split)
    if not {"messages", "prompt", "text", "input_ids"} & {*train.column_names}:
        train = train.map(to_messages, remove_columns=train.column_names)
    if "input_ids" in train.column_names:  # packed already: left alone, TRL would pack or mix these rows again
        vars(args).update(packing=False, assistant_only_loss=False, padding_free=True, max_length=None)
    if args.assistant_only_loss and "messages" in train.column_names:
        bad = [i for i, turns in enumerate(train["messages"]) if all(turn["role"] != "assistant" for turn in turns)]
        if bad:
            (print if script.skip_bad_rows else sys.exit)(f"{HERE.name}: {len(bad)} rows of {name} have no assistant "
                                                          f"turn: {bad[:9]} from 0; --skip_bad_rows leaves them out")
        train = train.select(sorted({*range(len(train))} - {*bad}))
    if held_out is None and script.eval_rows:
        train, held_out = train.train_test_split(script.eval_rows, seed=args.seed).values()
    return tokenizer, train, held_out


def begin(trainer, script):
    for weight in (w for w in trainer.model.parameters() if w.requires_grad and not hasattr(w, "ds_id")):
        # QLoRA adapters come from TRL as bf16, from a resume as fp32
        weight.data = weight.data if "bf16_weights" in script.allow else weight.data.float()
    # on a CPU, bitsandbytes repacks 4-bit weights for an evaluation, and from then on no gradient passes them
    [vars(layer).update(support_avx512bf16_for_cpu=False) for layer in trainer.model.modules()]
    args, tokenizer, out = trainer.args, trainer.processing_class, Path(trainer.args.output_dir)
    # what is saved carries the serving form of the template: markers become empty comments, which render nothing
    tokenizer.chat_template = re.sub(r"{%(\W?)\s*(?:end)?generation\s*(\W?)%}", r"{#\1 \2#}", tokenizer.chat_template)
    if trainer.is_world_process_zero():
        print(args.model_init_kwargs, f"{args.use_liger_kernel=}", args.resume_from_checkpoint or "from=start")
        shutil.copy(HERE, out / HERE.name)
        (out / "config.yaml").write_text(yaml.safe_dump(script.resolved))
        (out / "versions.json").write_text(json.dumps({d.name: d.version for d in importlib.metadata.distributions()}))


@dataclass
class NanochatArguments(RecipeArguments):
    optimizer: str = field(default="", metadata={"help": "Python file whose build(model, args) makes the optimizer"})
    micro_batch_mean: bool = field(default=False, metadata={"help": "every pass weighs alike, however few its tokens"})
    whole_steps: bool = field(default=False, metadata={"help": "leave out the rows that fill no step"})
RecipeArguments = NanochatArguments  # fmt: skip

def main():
    hooks = {path: runpy.run_path(path) for path in DEFAULTS["hooks"] if Path(path).is_file()}
    script, args, model = parse_args()
    if not Path(script.optimizer).is_file():
        sys.exit(f"{HERE.name}: --optimizer {script.optimizer}: no such file: pass the path of optimizers/nanochat.py")
    hooks |= {p: runpy.run_path(p) for p in (script.optimizer, *script.hooks) if p not in hooks and Path(p).is_file()}
    if missing := [path for path in script.hooks if path not in hooks]:
        print(f"{HERE.name}: runs on without its hooks, which are not there: {' '.join(missing)}")
    [hook["prepare"](script, args, model) for hook in hooks.values() if "prepare" in hook]
    tokenizer, script.rows, held_out = load_data(script, args, model)
    whole = len(script.rows) // script.global_batch_size * script.global_batch_size  # nanochat has no short last step
    script.rows = script.rows.select(range(script.whole_steps * whole or len(script.rows)))
    trainer = SFTTrainer(
        model.model_name_or_path, args, train_dataset=script.rows, eval_dataset=held_out, processing_class=tokenizer,
        optimizer_cls_and_kwargs=(lambda: hooks[script.optimizer]["build"], {"args": args}))
    trainer.model_accepts_loss_kwargs &= not script.micro_batch_mean  # False: the trainer averages means of passes
    [trainer.add_callback(hook["callback"](trainer)) for hook in hooks.values() if "callback" in hook]
    begin(trainer, script)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    [hook["after"](trainer) for hook in hooks.values() if "after" in hook]


if __name__ == "__main__":
    main()
