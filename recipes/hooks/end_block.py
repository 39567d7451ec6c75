"""When a run ends, draw loss.png and say in a few lines what is in the run folder and which commands come next."""

import shlex
from pathlib import Path

from trl import ModelConfig, ScriptArguments

from data_prep.common.run_folder import checkpoint_step, plot_log, read_log

from .loss_name import describe_validation_loss, name_loss
from .messages import relative_path
from .throughput import describe_other_memory
from .trainer import SFTTrainer

REPO = Path(__file__).resolve().parents[2]
RUN_FILES = ("log.jsonl", "loss.png", "config.yaml", "versions.json")


def draw_loss(folder: Path) -> str | None:
    """Draw loss.png in a run folder; return why there is none, else None. A run must not fail over its picture."""
    unfinished = folder / ".loss.png.part"
    try:
        series = read_log(folder)
        if not series:
            return "nothing was logged"
        plot_log(series, unfinished)
        unfinished.replace(folder / "loss.png")
    except (ImportError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def quote_path(path: str | Path) -> str:
    return shlex.quote(relative_path(path))


def module_command(name: str) -> str:
    """Return what runs a command of this repository from the working folder."""
    command = f"python -m {name}"
    if Path.cwd() != REPO:
        command = f"PYTHONPATH={shlex.quote(str(REPO))} {command}"
    return command


def find_test_split(dataset: Path, validation_split: str) -> str | None:
    """Return the split of a dataset folder to measure on, None if it has none or is no folder."""
    for name in ("test", validation_split):
        if (dataset / name).is_dir():
            return name
    return None


def next_commands(
    folder: Path, columns: list[str], script_args: ScriptArguments, model_args: ModelConfig
) -> dict[str, str]:
    """Return {purpose: command} for a run folder; `columns`: of the rows that it was trained on."""
    dataset = Path(script_args.dataset_name)
    split = find_test_split(dataset, script_args.dataset_test_split)
    data_flags = "--data VALIDATION.jsonl"
    if split:
        data_flags = f"--data {quote_path(dataset)} --split {split}"
    is_chat = "messages" in columns

    commands = {}
    has_eval = (REPO / "eval").is_dir()
    if is_chat and has_eval:
        base = quote_path(model_args.model_name_or_path)
        compare = module_command("eval.compare")
        commands["measure"] = f"{compare} --base {base} --tuned {quote_path(folder)} {data_flags}"
    if not is_adapter(folder):
        commands["serve"] = f"transformers serve {quote_path(folder)}"
    elif has_eval:
        merged = quote_path(folder / "merged")
        merge = f"{module_command('eval.merge')} {quote_path(folder)} --out {merged}"
        if is_chat and split:
            merge += f" {data_flags}"
        commands["merge"] = merge
        commands["serve"] = f"transformers serve {merged}"
    return commands


def describe_result(trainer: SFTTrainer) -> str:
    """Return how many steps were trained and the last figures."""
    state = trainer.state
    last = {}
    for entry in state.log_history:
        last.update(entry)

    parts = [f"{state.global_step:,} steps"]
    if state.global_step < state.max_steps:
        parts = [f"stopped after {state.global_step:,} of {state.max_steps:,} steps"]
    if "loss" in last:
        parts.append(f"loss {last['loss']:.4g}")
    if "eval_loss" in last:
        parts.append(describe_validation_loss(last["eval_loss"], name_loss(trainer)))
    if "memory_gib" in last:
        text = f"{last['memory_gib']:.1f} GiB at most"
        others = describe_other_memory(trainer.optimizer)
        parts.append(f"{text} ({others})" if others else text)
    return ", ".join(parts)


def describe_files(folder: Path, no_picture: str | None) -> str:
    """Return what a run folder holds beside the model; `no_picture`: why there is no loss.png."""
    names = [name for name in RUN_FILES if (folder / name).is_file()]
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=checkpoint_step):
        names.append(checkpoint.name)
    text = ", ".join(names)
    if no_picture:
        text += f"; no loss.png: {no_picture}"
    return text


def end_block(
    trainer: SFTTrainer, script_args: ScriptArguments, model_args: ModelConfig, no_picture: str | None
) -> list[str]:
    """Return the lines to print when a run ends; `no_picture`: why there is no loss.png."""
    folder = Path(trainer.args.output_dir)
    kind = "adapter" if is_adapter(folder) else "model"
    block = {
        "done": describe_result(trainer),
        kind: f"{relative_path(folder)}, with its tokenizer and serving template",
        "files": describe_files(folder, no_picture),
    }
    if trainer.state.global_step < trainer.state.max_steps:
        block["go on"] = "the same command with --resume_from_checkpoint true"
    columns = trainer.train_rows.column_names or []
    block.update(next_commands(folder, columns, script_args, model_args))
    return [f"  {name:<10} {value}" for name, value in block.items()]


def print_end_block(trainer: SFTTrainer, script_args: ScriptArguments, model_args: ModelConfig) -> None:
    """Draw loss.png and print the end block, on the main process."""
    if not trainer.is_world_process_zero():
        return
    no_picture = draw_loss(Path(trainer.args.output_dir))
    print(*end_block(trainer, script_args, model_args, no_picture), sep="\n", flush=True)
