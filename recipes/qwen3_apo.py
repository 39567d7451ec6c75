"""Preference training (APO) of Qwen3-8B after supervised fine-tuning, on one 24 to 80 GB GPU: bf16 base, adapters.

    python -m data_prep.filter judged.jsonl --agreement --export preference --out pairs.jsonl
    accelerate launch recipes/qwen3_apo.py --adapter runs/qwen3_lora --dataset_name pairs.jsonl
    accelerate launch recipes/qwen3_apo.py --model_name_or_path runs/merged --dataset_name pairs.jsonl

DEFAULTS < --config run.yaml < flags. It begins from an SFT run's adapter, trained on, or from a model (merged, or all
weights trained), with a new adapter; the reference is what it begins from. --sft_dataset_name is the set of that run:
pairs of the prompts that it held out are validation here too. One evaluation set serves all stages so: a stage that
trains what another held out looks better than it is, and what a stage gains or loses shows on the same prompts alone.
APO-zero, beta and rate are SmolLM3's: it raises the chosen answer and lowers the rejected one, each by itself.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if (Path(__file__).resolve().parent / "hooks" / "__init__.py").is_file():
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import hooks  # refuses what would waste the run; trains the same
    from hooks import TrlParser, preference  # the parser is TRL's own, with that in it
else:
    hooks = None  # a copy elsewhere
    from trl import TrlParser

import pandas
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, DatasetDict, Json, List, load_dataset, load_from_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

RECIPE = Path(__file__).resolve()


def find_template(name: str) -> str:
    """Return the path of a chat template: beside this file, as a copy may have it, else in the repository."""
    beside = RECIPE.parent / name
    return str(beside if beside.is_file() else RECIPE.parents[1] / "chat_templates" / name)


DEFAULTS = dict(
    # model: frozen, so bf16 loses nothing; the adapters are fp32
    model_name_or_path="Qwen/Qwen3-8B",
    dtype="bfloat16",
    # adapter: a new one; --adapter has its own rank, alpha and layers
    use_peft=True,
    lora_r=16,
    lora_alpha=32,
    lora_dropout=0.0,
    lora_target_modules="all-linear",  # whatever the family calls them, but for the head
    # data
    dataset_name="trl-lib/ultrafeedback_binarized",
    dataset_test_split="validation",
    eval_rows=200,  # drawn from train by seed where there is no such split
    chat_template_path=find_template("qwen3.jinja"),
    max_length=2048,  # tokens of prompt and answer; longer answers are truncated
    # preference
    loss_type="apo_zero",
    beta=0.05,  # how far an answer's log-ratio to the reference moves before its gradient fades
    # optimization
    global_batch_size=32,  # pairs per optimizer step over all processes
    per_device_train_batch_size=1,
    learning_rate=1e-6,  # SmolLM3's, of all weights; adapters alone usually take ten times as much
    lr_scheduler_type="cosine",
    warmup_steps=0.1,  # share of steps
    num_train_epochs=1,
    optim="adamw_torch_fused",
    weight_decay=0.01,
    max_grad_norm=1.0,
    activation_checkpointing=True,
    use_liger_kernel=True,  # its layer kernels, where there is a GPU and Liger is installed
    # run
    output_dir=f"runs/{RECIPE.stem}",
    seed=42,
    logging_steps=1,
    logging_nan_inf_filter=False,  # a NaN must be seen
    eval_strategy="steps",
    eval_steps=20,
    per_device_eval_batch_size=1,
    save_steps=20,
    save_total_limit=2,
)


def to_pair(row: dict) -> dict:
    # your own columns: make lists of turns of them, a system prompt as the first turn of the prompt;
    # sets with a column prompt are taken as they are, whole conversations as chosen and rejected are read here
    return {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]}


# -- the same in every recipe (tests/recipes/test_recipes.py) --
# datasets reads and writes JSON by pandas' functions, which bend numbers: 0.7 becomes 0.7000000000000001
pandas.io.json.ujson_loads = json.loads
pandas.io.json.ujson_dumps = json.dumps


@dataclass
class RecipeArguments(ScriptArguments):
    global_batch_size: int = field(default=16, metadata={"help": "rows or packs per optimizer step, all processes"})
    eval_rows: int = field(
        default=0, metadata={"help": "train rows kept for validation where the set has no such split"}
    )
    hooks: list[str] = field(default_factory=list, metadata={"help": "more hook files, as eval/in_training.py"})
    allow: list[str] = field(
        default_factory=list, metadata={"help": "what a check would refuse, by the name that it gives"}
    )


def load_json(path: Path, split: str) -> DatasetDict:
    """Load what is rendered of a .jsonl or .json file as JSON: in typed columns 1 beside 0.5 is 1.0, text a date."""
    files = {split: str(path)}
    features = load_dataset("json", data_files=files)[split].features
    for name in ("messages", "prompt", "completion", "chosen", "rejected", "tools"):
        if isinstance(features.get(name), List):
            features[name] = List(Json())
    if "chat_template_kwargs" in features:
        features["chat_template_kwargs"] = Json()
    return load_dataset("json", data_files=files, features=features)


def load_set(name: str, script_args: RecipeArguments) -> DatasetDict:
    """Load a hub id, a .jsonl, .json or .parquet file, or a save_to_disk folder."""
    path = Path(name)
    if path.is_dir():
        return load_from_disk(path)
    if path.is_file() and path.suffix == ".parquet":
        return load_dataset("parquet", data_files={script_args.dataset_train_split: str(path)})
    if path.is_file():
        return load_json(path, script_args.dataset_train_split)
    return load_dataset(name, script_args.dataset_config)


def load_splits(script_args: RecipeArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Load pairs, (train, validation or None); pairs of prompts that SFT held out are all on the side of validation."""
    splits = load_set(script_args.dataset_name, script_args)
    train = splits[script_args.dataset_train_split]
    validation = splits.get(script_args.dataset_test_split)
    if not {"chosen", "rejected"} <= set(train.column_names):
        raise ValueError(f"its rows ({', '.join(train.column_names)}) are no pairs: they need chosen and rejected")
    if "prompt" not in train.column_names:
        train = train.map(to_pair)
        if validation is not None:
            validation = validation.map(to_pair)
    if validation is None and script_args.sft_dataset_name:
        held_out = read_held_out_prompts(script_args, seed)
        sides = [read_prompt(row) in held_out for row in train]
        validation = train.select([number for number, side in enumerate(sides) if side])
        train = train.select([number for number, side in enumerate(sides) if not side])
        if not len(validation):  # no pair is of such a prompt: some are drawn
            validation = None
    if validation is None and script_args.eval_rows:
        train, validation = split_by_prompt(train, script_args, seed)
    return train, validation


def read_held_out_prompts(script_args: RecipeArguments, seed: int) -> set[str]:
    """Return the prompts of the SFT set's validation: its split, else what its recipe drew by eval_rows and seed."""
    splits = load_set(script_args.sft_dataset_name, script_args)
    validation = splits.get(script_args.dataset_test_split)
    if validation is None:
        _, validation = split_by_prompt(splits[script_args.dataset_train_split], script_args, seed)
    return {read_prompt(row) for row in validation}


def read_prompt(row: dict) -> str:
    """Return what a row asks: all turns but the assistant's, without /think and /no_think; else its text or tokens."""
    turns = row.get("messages") or row.get("prompt")
    if not isinstance(turns, list):
        return str(turns or row.get("text") or row.get("input_ids"))
    asked = " ".join(str(turn.get("content")) for turn in turns if turn.get("role") != "assistant")
    return " ".join(re.sub(r"\s*/(?:no_think|think)\b", "", asked).split())


def split_by_prompt(rows: Dataset, script_args: RecipeArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Return (train, validation): up to eval_rows rows drawn by seed, all rows of a prompt on one side."""
    rows = rows.shuffle(seed=seed)
    prompts = [hash(read_prompt(row)) for row in rows]
    held_out = set()
    rows_left = script_args.eval_rows
    for prompt, size in Counter(prompts).items():
        if size <= rows_left:
            held_out.add(prompt)
            rows_left -= size
    train = [number for number, prompt in enumerate(prompts) if prompt not in held_out]
    validation = [number for number, prompt in enumerate(prompts) if prompt in held_out]
    if not train or not validation:
        raise ValueError(
            f"--eval_rows {script_args.eval_rows}: dataset {script_args.dataset_name} has {len(rows):,} rows of "
            f"{len(set(prompts)):,} prompts, which stay whole: pass another number, or 0 for no validation"
        )
    return rows.select(train), rows.select(validation)


def choose_attention(training_args: DPOConfig) -> str:
    if not torch.cuda.is_available() or training_args.use_cpu:
        return "sdpa"
    return "flash_attention_2" if is_flash_attn_2_available() else "flex_attention"


def choose_checkpoint(training_args: DPOConfig) -> str | None:
    """Turn `--resume_from_checkpoint true` into the newest checkpoint of output_dir, or None to start afresh."""
    choice = str(training_args.resume_from_checkpoint).lower()
    if choice in ("none", "false"):
        return None
    if choice != "true":
        return training_args.resume_from_checkpoint
    # trainer_state.json is written last: a checkpoint whose save was cut short has none, or one without its end
    states = Path(training_args.output_dir).glob("checkpoint-*/trainer_state.json")
    whole = [path.parent for path in states if path.read_text().endswith("\n}\n")]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[-1]))) if whole else None


def serving_template(template: str) -> str:
    """Turn generation markers into empty comments, which render nothing and which every engine takes."""
    return re.sub(r"{%(\W?)\s*(?:end)?generation\s*(\W?)%}", r"{#\1 \2#}", template)


def parse_args(parser: TrlParser) -> tuple[RecipeArguments, DPOConfig, ModelConfig]:
    """Read DEFAULTS < --config < flags, and derive what depends on the number of processes and on the hardware."""
    unknown = parser.set_defaults_with_config(**DEFAULTS)
    if unknown:
        parser.error(f"DEFAULTS holds names that nobody knows: {unknown}")
    script_args, training_args, model_args = parser.parse_args_and_config()
    if script_args.hooks and not hooks:
        parser.error("--hooks: needs the folder recipes/hooks beside this recipe")
    if training_args.gradient_accumulation_steps != 1:
        parser.error("--gradient_accumulation_steps is derived: pass --global_batch_size")
    output_dir = Path(training_args.output_dir)
    afresh = str(training_args.resume_from_checkpoint).lower() in ("none", "false")
    used = output_dir.is_dir() and any(path.name != "_lock" for path in output_dir.iterdir())  # _lock: by hooks
    if afresh and used:
        parser.error(
            f"{output_dir} is in use: --resume_from_checkpoint true goes on there, another --output_dir is new"
        )

    # the batch is global: another accelerate config changes the speed, not the experiment
    data_parallel_size = training_args.world_size // ParallelismConfig().non_data_parallel_size
    micro_batch_size = training_args.per_device_train_batch_size * data_parallel_size
    if script_args.global_batch_size % micro_batch_size:
        parser.error(f"--global_batch_size must be a multiple of {micro_batch_size}: what all processes take at a time")
    training_args.gradient_accumulation_steps = script_args.global_batch_size // micro_batch_size
    training_args.model_init_kwargs = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation or choose_attention(training_args),
        **(training_args.model_init_kwargs or {}),
    }
    if not torch.cuda.is_available() or training_args.use_cpu or not is_liger_kernel_available():
        training_args.use_liger_kernel = False
    return script_args, training_args, model_args


def prepare_weights(trainer: DPOTrainer, model_args: ModelConfig) -> None:
    """Hold adapters in fp32, and keep 4-bit layers as they were loaded."""
    for weight in trainer.model.parameters():
        if model_args.use_peft and weight.requires_grad and not hasattr(weight, "ds_id"):
            weight.data = weight.data.float()  # TRL makes QLoRA's bf16, and a resume makes them fp32
    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights in an evaluation on a CPU, and gradients would stop there
            module.support_avx512bf16_for_cpu = False


# -- this recipe --
@dataclass
class PreferenceArguments(RecipeArguments):
    adapter: str | None = field(default=None, metadata={"help": "an SFT run's adapter, to train on from"})
    sft_dataset_name: str | None = field(
        default=None, metadata={"help": "the SFT run's set, whose validation prompts stay validation"}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "a template's file; none: the SFT run's own"}
    )


def make_parser() -> TrlParser:
    return TrlParser((PreferenceArguments, DPOConfig, ModelConfig), allow_abbrev=False)


def load_tokenizer(script_args: PreferenceArguments, model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the SFT run, with the template in its serving form."""
    tokenizer = AutoTokenizer.from_pretrained(script_args.adapter or model_args.model_name_or_path)
    if script_args.chat_template_path:
        tokenizer.chat_template = serving_template(Path(script_args.chat_template_path).read_text(encoding="utf-8"))
    return tokenizer


def load_policy(
    script_args: PreferenceArguments, training_args: DPOConfig, model_args: ModelConfig
) -> dict[str, object]:
    """Return what the trainer takes as its model: a name and a new adapter, or a model with the SFT run's adapter.

    TRL keeps a frozen copy of such an adapter as the reference; of a name, the reference is the model without adapters.
    """
    quantization = get_quantization_config(model_args)
    name = model_args.model_name_or_path
    if not script_args.adapter:
        return {"model": name, "quantization_config": quantization, "peft_config": get_peft_config(model_args)}
    if not model_args.use_peft:
        raise ValueError("--adapter: full fine-tuning trains no adapter: merge it and pass --model_name_or_path")
    init_kwargs = training_args.model_init_kwargs
    training_args.model_init_kwargs = None  # the trainer loads nothing
    if quantization is not None:  # None would stand for "not quantized", whatever the model's config says
        init_kwargs = init_kwargs | {"quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(name, **init_kwargs)
    return {"model": PeftModel.from_pretrained(model, script_args.adapter, is_trainable=True)}


def main() -> None:
    parser = make_parser()
    script_args, training_args, model_args = parse_args(parser)
    if hooks:
        preference.before_load(parser, script_args, training_args, model_args)
    elif training_args.process_index == 0:
        print(f"{RECIPE.name}: recipes/hooks is not beside it: no checks, no verified checkpoints")
    training_args.resume_from_checkpoint = choose_checkpoint(training_args)

    train, validation = load_splits(script_args, training_args.seed)
    tokenizer = load_tokenizer(script_args, model_args)
    trainer = DPOTrainer(
        args=training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        **load_policy(script_args, training_args, model_args),
    )
    prepare_weights(trainer, model_args)
    if script_args.adapter:
        # TRL has rounded an adapter beside 4-bit weights to bf16, and the reference is not
        trainer.model.load_adapter(script_args.adapter, "default", is_trainable=True)

    if hooks:
        preference.before_train(trainer, parser, script_args, model_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if hooks:
        preference.after_train(trainer)


if __name__ == "__main__":
    main()
