"""The last lines of every command: rows by split, where the refused rows lie, and the command to type next.

The order of steps stands here alone: normalize, check, dedup or mix, stats, preview, recipe, compare, gate, merge.
"""

import json
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from .recipe_settings import FLAGS

RECIPE = "recipes/qwen3_qlora.py"  # where no recipe has been named yet: the one to begin with
COMPILED = "recipes/configs/compiled.yaml"  # which a set of tokens is trained with

NextCommand = Callable[[Namespace], str | None]


def join_command(module: str, *words: object) -> str:
    """Return a command of ours, its words quoted for a shell."""
    return f"python -m {module} {shlex.join([str(word) for word in words])}"


def name_output(args: Namespace, step: str) -> str:
    """Return a path beside a command's input, for what the next step makes of it."""
    path = Path(args.out or args.path)
    ending = ".jsonl" if path.suffix == ".jsonl" else ""  # a folder for any other
    return str(path.with_name(f"{path.stem}-{step}{ending}"))


def after_rows(args: Namespace) -> str:
    return join_command("data_prep.check", args.out)


def after_check(args: Namespace) -> str:
    rows = args.out or args.path
    return join_command("data_prep.dedup", rows, "--out", name_output(args, "dedup"))


def after_findings(args: Namespace) -> str | None:
    if not args.rows_left:  # the template does not fit
        return None
    if args.fix:  # what is left has been left out
        return after_check(args)
    words = ["--recipe", args.recipe] if args.recipe else []
    return join_command("data_prep.check", args.path, *words, "--fix", "--out", name_output(args, "checked"))


def after_set(args: Namespace) -> str:
    return join_command("data_prep.stats", args.out, "--recipe", getattr(args, "recipe", None) or RECIPE)


def after_stats(args: Namespace) -> str:
    return join_command("data_prep.preview", args.data, "--recipe", args.recipe, *list_recipe_words(args))


def list_recipe_words(args: Namespace) -> list[str]:
    """Return the words that settle what a recipe trains, after its name: those given to this command."""
    words = []
    if args.config:
        words += ["--config", args.config]
    for name in FLAGS:
        value = getattr(args, name, None)
        if value is not None:
            words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def launch_recipe(*words: object) -> str:
    """Return the command that trains a recipe."""
    return f"accelerate launch {shlex.join([str(word) for word in words])}"


def after_preview(args: Namespace) -> str:
    return launch_recipe(args.recipe, *list_recipe_words(args), "--dataset_name", args.data)


def after_compile(args: Namespace) -> str:
    return launch_recipe(args.recipe, "--config", COMPILED, "--dataset_name", args.out)


def after_compare(args: Namespace) -> str:
    return join_command("eval.gate", args.out or args.tuned[0])


def after_gate(args: Namespace) -> str:
    if not (args.run / "adapter_config.json").is_file():
        return join_command("eval.card", args.run)
    return join_command("eval.merge", args.run, "--out", args.run / "merged")


def after_merge(args: Namespace) -> str:
    return f"transformers serve {shlex.quote(str(args.out))}"


NEXT: dict[tuple[str, int], NextCommand] = {  # by command and exit code
    ("normalize", 0): after_rows,
    ("filter", 0): after_rows,
    ("generate", 0): after_rows,
    ("expand_turns", 0): after_rows,
    ("decontaminate", 0): after_rows,
    ("check", 0): after_check,
    ("check", 1): after_findings,
    ("dedup", 0): after_set,
    ("mix", 0): after_set,
    ("stats", 0): after_stats,
    ("preview", 0): after_preview,
    ("compile", 0): after_compile,
    ("compare", 0): after_compare,
    ("gate", 0): after_gate,
    ("merge", 0): after_merge,
}


def print_end(program: str, args: Namespace, code: int) -> None:
    """Print the last lines of a command. program: check.py, or python -m data_prep.check, as argparse names it."""
    name = program.removesuffix(".py").split(".")[-1]
    for line in describe_end(name, args, code):
        print(line)


def describe_end(name: str, args: Namespace, code: int) -> Iterator[str]:
    """Yield the last lines of a command. name: as in `python -m data_prep.NAME`."""
    out = getattr(args, "out", None)
    if out is not None and code == 0:  # a failure has said where
        yield from describe_output(Path(out))
    next_command = NEXT.get((name, code))
    if next_command is None:
        return
    line = next_command(args)
    if line is not None:
        yield f"next: {line}"


def describe_output(out: Path) -> Iterator[str]:
    """Yield how many rows each split has, where there are several, and where the refused rows lie."""
    report = out / "report.json"
    rejected = out / "rejected.jsonl"
    if out.suffix == ".jsonl":
        report = out.with_suffix(".report.json")
        rejected = out.with_suffix(".rejected.jsonl")
    counts = read_counts(report)
    if len(counts) > 1:
        yield "splits: " + ", ".join([f"{split} {rows:,}" for split, rows in counts.items()])
    if rejected.is_file() and rejected.stat().st_size:
        yield f"refused rows: {rejected}"


def read_counts(report: Path) -> dict[str, int]:
    """Return the rows by split that a report of ours names, {} where it names none."""
    try:
        counts = json.loads(report.read_text(encoding="utf-8")).get("out")
    except (OSError, ValueError, AttributeError):
        return {}
    if not isinstance(counts, dict):
        return {}
    return {split: rows for split, rows in counts.items() if isinstance(rows, int)}
