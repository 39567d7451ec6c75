"""Full fine-tuning of Qwen3-4B-Base into a chat model: fp32 master weights, bf16 compute.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/qwen3_full.py
    accelerate launch recipes/qwen3_full.py --model_name_or_path Qwen/Qwen3-1.7B-Base --dataset_name rows.jsonl

DEFAULTS < --config run.yaml < flags. Weights, gradients and AdamW states in fp32 take 16 bytes a parameter, 64 GB;
with activations 67.8 GiB are predicted (python -m eval.fit).
"""

import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

if (Path(__file__).resolve().parent / "hooks" / "__init__.py").is_file():
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import hooks  # refuses what would waste the run, verifies checkpoints, shows progress; trains the same
    from hooks import SFTTrainer, TrlParser  # TRL's own, with that in them
else:
    hooks = None  # a copy elsewhere
    from trl import SFTTrainer, TrlParser

import pandas
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, DatasetDict, Json, List, load_dataset, load_from_disk
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

RECIPE = Path(__file__).resolve()


def find_template(name: str) -> str:
    """Return the path of a chat template: beside this file, as a copy may have it, else in the repository."""
    beside = RECIPE.parent / name
    return str(beside if beside.is_file() else RECIPE.parents[1] / "chat_templates" / name)


DEFAULTS = dict(
    # model: fp32 master weights, bf16 compute by autocast (TRL's default bf16=True)
    model_name_or_path="Qwen/Qwen3-4B-Base",
    dtype="float32",
    eos_token="<|im_end|>",  # the base model stops on <|endoftext|>, which no chat template writes
    # data
    dataset_name="openai/gsm8k",
    dataset_config="main",
    dataset_test_split="validation",
    eval_rows=200,  # drawn from train by seed where there is no such split: GSM8K's test split stays unseen
    chat_template_path=find_template("qwen3_instruct_2507.jinja"),
    assistant_only_loss=True,
    packing=True,
    max_length=2048,  # tokens in a pack of whole rows that do not see each other; longer rows are truncated
    # optimization
    global_batch_size=16,  # packs per optimizer step over all processes
    per_device_train_batch_size=1,
    learning_rate=1e-5,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,  # share of steps
    num_train_epochs=2,
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


def to_messages(row: dict) -> dict:
    # your own columns: write their names for "question" and "answer", a system prompt as one more message before them;
    # sets with a column messages, completion, text or input_ids are taken as they are
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}


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
    for name in ("messages", "prompt", "completion", "tools"):
        if isinstance(features.get(name), List):
            features[name] = List(Json())
    if "chat_template_kwargs" in features:
        features["chat_template_kwargs"] = Json()
    return load_dataset("json", data_files=files, features=features)


def load_splits(script_args: RecipeArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """Load (train, validation or None) from a hub id, a .jsonl, .json or .parquet file, or a save_to_disk folder."""
    path = Path(script_args.dataset_name)
    if path.is_dir():
        splits = load_from_disk(path)
    elif path.is_file() and path.suffix == ".parquet":
        splits = load_dataset("parquet", data_files={script_args.dataset_train_split: str(path)})
    elif path.is_file():
        splits = load_json(path, script_args.dataset_train_split)
    else:
        splits = load_dataset(script_args.dataset_name, script_args.dataset_config)

    train = splits[script_args.dataset_train_split]
    validation = splits.get(script_args.dataset_test_split)
    if not {"messages", "completion", "text", "input_ids"} & set(train.column_names):
        train = train.map(to_messages, remove_columns=train.column_names)
        if validation is not None:
            validation = validation.map(to_messages, remove_columns=validation.column_names)
    if validation is None and script_args.eval_rows:
        train, validation = split_by_prompt(train, script_args, seed)
    return train, validation


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


def choose_attention(training_args: SFTConfig) -> str:
    if not torch.cuda.is_available() or training_args.use_cpu:
        return "sdpa"
    return "flash_attention_2" if is_flash_attn_2_available() else "flex_attention"


def choose_checkpoint(training_args: SFTConfig) -> str | None:
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


def parse_args(parser: TrlParser) -> tuple[RecipeArguments, SFTConfig, ModelConfig]:
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


def prepare_weights(trainer: SFTTrainer, model_args: ModelConfig) -> None:
    """Hold adapters in fp32, and keep 4-bit layers as they were loaded."""
    for weight in trainer.model.parameters():
        if model_args.use_peft and weight.requires_grad and not hasattr(weight, "ds_id"):
            weight.data = weight.data.float()  # TRL makes QLoRA's bf16, and a resume makes them fp32
    for module in trainer.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weights in an evaluation on a CPU, and gradients would stop there
            module.support_avx512bf16_for_cpu = False


# -- this recipe: an optimizer from a file, where one is named --
@dataclass
class FullArguments(RecipeArguments):
    optimizer: str | None = field(
        default=None, metadata={"help": "Python file with `check` and `Factory`, as optimizers/muon.py; else --optim"}
    )


def import_optimizer(path: str) -> ModuleType:
    """Import a Python file that holds `check(training_args)` and `Factory`, which transformers makes and calls."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_parser() -> TrlParser:
    return TrlParser((FullArguments, SFTConfig, ModelConfig), allow_abbrev=False)


def main() -> None:
    parser = make_parser()
    script_args, training_args, model_args = parse_args(parser)
    optimizer_cls_and_kwargs = None  # what --optim names
    if script_args.optimizer:
        if not Path(script_args.optimizer).is_file():
            parser.error(f"--optimizer {script_args.optimizer}: no such file: pass the path of optimizers/muon.py")
        optimizer = import_optimizer(script_args.optimizer)
        try:
            optimizer.check(training_args)
        except (AttributeError, ValueError) as error:  # no such function in it, or what it refuses
            parser.error(f"--optimizer {script_args.optimizer}: {error}")
        optimizer_cls_and_kwargs = (optimizer.Factory, {"training_args": training_args})
    if hooks:
        hooks.before_load(parser, script_args, training_args, model_args)
    elif training_args.process_index == 0:
        print(f"{RECIPE.name}: recipes/hooks is not beside it: no checks, no verified checkpoints")
    training_args.resume_from_checkpoint = choose_checkpoint(training_args)

    train, validation = load_splits(script_args, training_args.seed)
    if hooks:
        hooks.check_rows(script_args, training_args, train, validation)
    trainer = SFTTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
    )
    prepare_weights(trainer, model_args)
    if trainer.processing_class.chat_template:
        trainer.processing_class.chat_template = serving_template(trainer.processing_class.chat_template)

    if hooks:
        hooks.before_train(trainer, parser, script_args, model_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if hooks:
        hooks.after_train(trainer, script_args, model_args)


if __name__ == "__main__":
    main()
