"""Step-3.5-Flash-SFT as StepTron trains it: whole packs in file order, Muon or Adam, the mean of the packs' means.

    accelerate launch --config_file accelerate_configs/fsdp2_8gpu.yaml recipes/step35_sft.py
    accelerate launch recipes/step35_sft.py --config recipes/configs/step35_qwen3_1p7b.yaml

DEFAULTS < --config run.yaml < flags. DEFAULTS: Flash's optimizer and schedule on Qwen3-1.7B-Base. The packs are made by
the commands at the head of data_prep/mixes/step35.yaml; recipes/README.md says what is published.
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
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available
from trl import ModelConfig, ScriptArguments, SFTConfig, get_peft_config, get_quantization_config

RECIPE = Path(__file__).resolve()


def find_template(name: str) -> str:
    """Return the path of a chat template: beside this file, as a copy may have it, else in the repository."""
    beside = RECIPE.parent / name
    return str(beside if beside.is_file() else RECIPE.parents[1] / "chat_templates" / name)


DEFAULTS = dict(
    # model: fp32 master weights, bf16 compute by autocast
    model_name_or_path="Qwen/Qwen3-1.7B-Base",
    dtype="float32",
    eos_token="<|im_end|>",  # the base model stops on <|endoftext|>, which no chat template writes
    router_aux_loss_coef=0.0,
    # data: packs of 131,072 tokens from data_prep/compile.py (under Apache-2.0 and CC-BY-NC-2.0: non-commercial)
    dataset_name="data/step35-packs",
    dataset_test_split="validation",
    train_sampling_strategy="sequential",  # in the order of the file
    chat_template_path=find_template("step3_qwen3.jinja"),  # what the packs were made with, and what is served
    assistant_only_loss=False,  # the labels stand in the packs
    packing=False,  # as do the documents
    padding_free=True,  # which do not see each other
    max_length=None,
    # optimization
    global_batch_size=32,  # packs per optimizer step over all processes
    per_device_train_batch_size=1,
    micro_batch_mean=True,  # every pack weighs alike, however many of its tokens are trained
    optimizer=str(RECIPE.parent / "optimizers" / "muon.py"),
    adam_beta2=0.95,  # of what Muon leaves to AdamW
    learning_rate=1e-5,
    lr_scheduler_type="cosine_with_min_lr",
    lr_scheduler_kwargs={"min_lr_rate": 0.5},
    warmup_steps=140,
    num_train_epochs=1,
    weight_decay=0.1,
    max_grad_norm=1.0,
    activation_checkpointing=True,
    use_liger_kernel=True,  # its layer kernels, where there is a GPU and Liger is installed
    # run
    output_dir=f"runs/{RECIPE.stem}",
    seed=1234,
    logging_steps=1,
    logging_nan_inf_filter=False,  # a NaN must be seen
    per_device_eval_batch_size=1,
    save_steps=500,
    save_total_limit=2,
)


def to_messages(row: dict) -> dict:
    # your own rows: data_prep/normalize.py makes messages of them, and data_prep/compile.py packs of those;
    # there is nothing to map here
    raise ValueError("rows are no packs: the commands at the head of data_prep/mixes/step35.yaml make them")


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


# -- this recipe: an optimizer and a tokenizer from elsewhere, and the mean of the packs' means --
@dataclass
class Step35Arguments(RecipeArguments):
    optimizer: str = field(
        default="", metadata={"help": "Python file with `check` and `Factory`, as optimizers/muon.py"}
    )
    micro_batch_mean: bool = field(default=False, metadata={"help": "a step's loss is the mean of its packs' means"})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "instead of the model's, as tokenizers/qwen3 of the released dataset"}
    )


def import_optimizer(path: str) -> ModuleType:
    """Import a Python file that holds `check(training_args)` and `Factory`, which transformers makes and calls."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tokenizer(name: str, model_args: ModelConfig) -> PreTrainedTokenizerBase:
    """Load another tokenizer than the model's. Raises ValueError where its ids are not those that the model learned."""
    model_name = model_args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        raise ValueError("no tokenizer there: pass the folder with its tokenizer.json") from None
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary, key=vocabulary.get)
    config = AutoConfig.from_pretrained(model_name, revision=model_args.model_revision)
    embeddings = config.get_text_config().vocab_size
    if vocabulary[last] >= embeddings:
        raise ValueError(
            f"its {last} has the id {vocabulary[last]:,}, and {model_name} has {embeddings:,} embeddings: pass the "
            "snapshot of the model's own family"
        )
    try:
        own = AutoTokenizer.from_pretrained(model_name, revision=model_args.model_revision).get_vocab()
    except (OSError, ValueError):  # weights alone
        return tokenizer
    moved = [token for token, number in vocabulary.items() if own.get(token, number) != number]
    if moved:
        raise ValueError(
            f"{len(moved):,} of its {len(vocabulary):,} tokens have other ids than in {model_name}, as {moved[0]!r}: "
            f"{vocabulary[moved[0]]:,}, there {own[moved[0]]:,}: pass the snapshot of the model's own family"
        )
    return tokenizer


def make_parser() -> TrlParser:
    return TrlParser((Step35Arguments, SFTConfig, ModelConfig), allow_abbrev=False)


def main() -> None:
    parser = make_parser()
    script_args, training_args, model_args = parse_args(parser)
    if not Path(script_args.optimizer).is_file():
        parser.error(f"--optimizer {script_args.optimizer}: no such file: pass the path of optimizers/muon.py")
    optimizer = import_optimizer(script_args.optimizer)
    try:
        optimizer.check(training_args)
    except (AttributeError, ValueError) as error:  # no such function in it, or what it refuses
        parser.error(f"--optimizer {script_args.optimizer}: {error}")
    if hooks:
        hooks.before_load(parser, script_args, training_args, model_args)
    elif training_args.process_index == 0:
        print(f"{RECIPE.name}: recipes/hooks is not beside it: no checks, no verified checkpoints")
    training_args.resume_from_checkpoint = choose_checkpoint(training_args)
    tokenizer = None  # the model's
    if script_args.tokenizer_name_or_path:
        try:
            tokenizer = load_tokenizer(script_args.tokenizer_name_or_path, model_args)
        except ValueError as error:
            parser.error(f"--tokenizer_name_or_path {script_args.tokenizer_name_or_path}: {error}")

    train, validation = load_splits(script_args, training_args.seed)
    if hooks:
        hooks.check_rows(script_args, training_args, train, validation)
    trainer = SFTTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        optimizer_cls_and_kwargs=(optimizer.Factory, {"training_args": training_args}),
    )
    if script_args.micro_batch_mean:
        trainer.model_accepts_loss_kwargs = False  # else a step's loss is the mean over all of its tokens
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
