"""Predict whether a recipe fits a GPU and how fast it trains, before the first GPU hour: no GPU, weights or data.

    python -m eval.fit recipes/qwen3_qlora.py --gpu rtx4080
    python -m eval.fit recipes/qwen3_qlora.py --gpu rtx4080 --max_length 8192 --rows 7273 --tokens_per_row 210
    python -m eval.fit recipes/qwen3_full.py --gpu h100 --config_file accelerate_configs/fsdp2_8gpu.yaml
    python -m eval.fit --table

Any other flag is the recipe's. What is read: the recipe's settings, and the model's config.json from a folder or the
hub; where the hub cannot be reached, data_prep/common/known_configs has the shapes of the recipes' models.

Peak memory: one optimizer step traced with fake tensors (data_prep/common/gpu_memory.py), plus 0.3 to 0.8 GiB for
CUDA's context and fragments, an estimate. Speed: counted work at a share of the card's peak (gpu_speed.py), a range.
Assumed: every token is trained (--trained_share), rows of 512 tokens in packs (--tokens_per_row), Liger where the
recipe asks for it, FlashAttention-2 (flex attention takes a little less) unless --attn_implementation says otherwise.

--table: cards x recipes in Markdown, of the recipes that are passed or of a choice. Exit 0: it fits; 1: it does not;
2: bad input. Errors of both kinds of prediction: eval/README.md.
"""

import argparse
import contextlib
import io
import json
import runpy
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.common.errors import UsageError
from data_prep.common.gpu_cards import CARDS, TABLE, Card, find_card
from data_prep.common.gpu_engines import Engine, read_engine
from data_prep.common.terminal import make_console
from eval.common.arguments import positive
from eval.common.scores import PIPE_WIDTH, command, parser_of
from eval.sweep import NO_FOLDER, without_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from data_prep.common.gpu_advice import Advice
    from data_prep.common.gpu_costs import Schedule
    from data_prep.common.gpu_memory import Prediction
    from data_prep.common.gpu_settings import RunSettings
    from data_prep.common.gpu_speed import Speed

ROWS = 1000  # whose time is told where nobody says how many there are
EIGHT = "accelerate_configs/fsdp2_8gpu.yaml"
TABLE_RUNS = (  # recipe, flags, accelerate config: every recipe's defaults, and variations of the first three
    ("recipes/qwen3_qlora.py", [], None),
    ("recipes/qwen3_qlora.py", ["--max_length", "8192"], None),
    ("recipes/qwen3_qlora.py", ["--model_name_or_path", "Qwen/Qwen3-8B"], None),
    ("recipes/qwen3_lora.py", [], None),
    ("recipes/qwen3_lora.py", ["--max_length", "8192"], None),
    ("recipes/qwen3_full.py", [], None),
    ("recipes/qwen3_full.py", [], EIGHT),
    ("recipes/qwen3_full.py", ["--config", "recipes/configs/qwen3_full_16k.yaml"], EIGHT),
    ("recipes/qwen3_full.py", ["--model_name_or_path", "Qwen/Qwen3-14B"], "accelerate_configs/zero3.yaml"),
    ("recipes/qwen3_lora.py", ["--config", "recipes/configs/qwen3_14b_qlora.yaml"], None),
    ("recipes/qwen3_apo.py", [], None),
    ("recipes/qwen3_5_lora.py", [], None),
    ("recipes/qwen2_5_qlora.py", [], None),
    ("recipes/llama3_1_qlora.py", [], None),
    ("recipes/gemma4_lora.py", [], None),
    ("recipes/gemma3_qlora.py", [], None),
    ("recipes/gpt_oss_lora.py", [], None),
    ("recipes/qwen3_moe_lora.py", [], None),
    ("recipes/gemma4_lora.py", ["--config", "recipes/configs/ministral3_lora.yaml"], None),
    ("recipes/qwen3_lora.py", ["--config", "recipes/configs/phi4_lora.yaml"], None),
    ("recipes/qwen3_lora.py", ["--config", "recipes/configs/phi4_mini_lora.yaml"], None),
    ("recipes/qwen3_lora.py", ["--config", "recipes/configs/smollm3-3b_qlora.yaml"], None),
    ("recipes/qwen3_lora.py", ["--config", "recipes/configs/lfm2_5_lora.yaml"], None),
    ("recipes/tool_calling_qlora.py", [], None),
    ("recipes/json_output_qlora.py", [], None),
    ("recipes/qwen3_thinking_qlora.py", [], None),
    ("recipes/reasoning_distill.py", [], None),
    ("recipes/smollm3_sft.py", [], EIGHT),
    ("recipes/smollm3_midtrain.py", [], "accelerate_configs/fsdp2_8nodes.yaml"),
    ("recipes/step35_sft.py", ["--max_length", "131072"], EIGHT),  # of its packs
    ("recipes/blossom_stage1.py", [], EIGHT),
    ("recipes/blossom_stage2.py", ["--model_name_or_path", "Qwen/Qwen3-8B-Base"], EIGHT),  # stage 1's folder
    ("recipes/nanochat_midtrain.py", [], "accelerate_configs/ddp_8gpu.yaml"),
    (
        "recipes/nanochat_sft.py",
        ["--model_name_or_path", "nanochat-students/base-d20"],
        "accelerate_configs/ddp_8gpu.yaml",
    ),
)


@dataclass
class Run:
    """What a prediction is for."""

    recipe: str
    flags: list[str]
    settings: "RunSettings"
    config: "PreTrainedConfig"
    config_source: str
    engine: Engine
    epochs: float
    schedule: "Schedule"

    @property
    def name(self) -> str:
        words = [Path(self.recipe).stem]
        for flag in self.flags:
            if flag.startswith("recipes/configs/"):
                flag = Path(flag).name
            words.append(flag)
        if self.engine.processes > 1:
            words.append(f"({self.engine.describe()})")
        return " ".join(words)


# -- the recipe -------------------------------------------------------------------------------------------------------
def read_arguments(recipe: str, flags: list[str]) -> tuple:
    """Return a recipe's three dataclasses as it reads these flags, with the attention and kernels of a GPU.

    Raises UsageError.
    """
    if not Path(recipe).is_file():
        raise UsageError(f"{recipe}: no such recipe: pass a file like recipes/qwen3_qlora.py")
    # what a recipe asks of this machine: nothing of a GPU, no division of the global batch, a folder that is not in use
    words = [*flags, "--use_cpu", "true", "--output_dir", NO_FOLDER]
    message = io.StringIO()
    with (
        mock.patch("sys.argv", [recipe, *words]),
        contextlib.redirect_stderr(message),
        contextlib.redirect_stdout(message),
    ):
        try:
            module = runpy.run_path(recipe)
            parser = module["make_parser"]()
            script_args, training_args, model_args = module["parse_args"](parser)
            asked = parser.parse_args(without_config(words))  # before it was bent to this machine
        except SystemExit:
            lines = message.getvalue().strip().splitlines() or ["it ended"]
            raise UsageError(f"{recipe} refuses its flags: {lines[-1]}") from None
        except KeyError as error:
            raise UsageError(f"{recipe}: has no {error}: pass a recipe like recipes/qwen3_qlora.py") from None
        except (ValueError, TypeError, OSError, SyntaxError) as error:
            raise UsageError(f"{recipe} refuses its flags: {' '.join(str(error).split())}") from None
    training_args.use_liger_kernel = bool(asked.use_liger_kernel)
    return script_args, training_args, model_args


def read_run(recipe: str, flags: list[str], engine: Engine, args: argparse.Namespace) -> Run:
    """Return what is to be predicted for a recipe, its flags and an engine. Raises UsageError."""
    from data_prep.common.gpu_configs import load_config
    from data_prep.common.gpu_costs import Schedule
    from data_prep.common.gpu_settings import ATTENTION, read_run_settings

    script_args, training_args, model_args = read_arguments(recipe, flags)
    attention = model_args.attn_implementation or ATTENTION
    settings = read_run_settings(script_args, training_args, model_args, attention, engine)
    at_a_time = settings.per_device_train_batch_size * engine.data_parallel_size
    if script_args.global_batch_size % at_a_time:
        raise UsageError(
            f"--global_batch_size {script_args.global_batch_size}: must be a multiple of {at_a_time}, what "
            f"{engine.describe()} take at a time: change it, or --per_device_train_batch_size"
        )
    settings = replace(settings, trained_share=args.trained_share, tokens_per_row=args.tokens_per_row)
    loaded = load_config(settings.model_name_or_path, model_args.model_revision)
    schedule = Schedule(
        eval_steps=count_steps(training_args.eval_strategy, training_args.eval_steps),
        save_steps=count_steps(training_args.save_strategy, training_args.save_steps),
        tokens=script_args.eval_rows * mean_tokens(settings, args),
    )
    return Run(recipe, flags, settings, loaded.config, loaded.source, engine, training_args.num_train_epochs, schedule)


def count_steps(strategy: str, steps: float | None) -> int | None:
    """Return every how many steps something happens, None where it is not by a number of steps."""
    if getattr(strategy, "value", strategy) != "steps" or not steps or steps < 1:
        return None
    return int(steps)


def mean_tokens(settings: "RunSettings", args: argparse.Namespace) -> int:
    """Return the tokens of a row."""
    if args.tokens_per_row:
        return args.tokens_per_row
    return int(settings.context) if settings.packing else settings.max_length


# -- words ------------------------------------------------------------------------------------------------------------
def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def describe_speed(speed: "Speed") -> str:
    return describe_range(speed.slow, speed.fast)


def describe_range(slow: float, fast: float) -> str:
    """Return tokens/s from and to, as "1,100 to 2,100"."""
    return f"{round_figure(slow):,.0f} to {round_figure(fast):,.0f}"


def round_figure(number: float) -> float:
    """Return a number with two digits that count: a prediction has no more."""
    return float(f"{number:.2g}")


def count(number: float, one: str, many: str | None = None) -> str:
    """Return "1 pack" or "2 packs"."""
    if number == 1:
        return f"1 {one}"
    return f"{number:g} {many or one + 's'}"


def describe_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def describe_verdict(prediction: "Prediction", card: Card) -> Text:
    """Return whether it fits, green, yellow or red."""
    low, high = prediction.needed
    amount = f"{gib(prediction.peak)} and 0.3 to 0.8 GiB more of {card.gib:.1f} GiB"
    if prediction.fits(card.gib):
        return Text(f"fits: {amount}, {card.gib - high / 2**30:.1f} GiB are left", style="green")
    if prediction.may_fit(card.gib):
        return Text(f"may fit: {amount}, nothing is left", style="yellow")
    return Text(f"does not fit: {amount}, {low / 2**30 - card.gib:.1f} GiB too much", style="red")


def describe_settings(run: Run) -> str:
    settings = run.settings
    unit = "row"
    if settings.packing:
        unit = "pack"
    elif settings.pairs:
        unit = "pair"
    rows = count(settings.per_device_train_batch_size, unit)
    steps = count(settings.gradient_accumulation_steps, "pass", "passes")
    weights = settings.dtype
    if settings.load_in_4bit:
        weights = "4 bits"
    elif settings.load_in_8bit:
        weights = "8 bits"
    training = "full fine-tuning"
    if settings.use_peft:
        targets = settings.lora_target_modules
        if isinstance(targets, tuple):
            targets = ", ".join(targets)
        training = f"LoRA r {settings.lora_r} on {targets or 'what PEFT chooses'}"
        if settings.lora_target_parameters:
            training += f" and {', '.join(settings.lora_target_parameters)}"
    activations = "kept"
    if settings.activation_checkpointing:
        activations = (
            f"checkpointed, every {settings.every_n_layers}" if settings.every_n_layers > 1 else "checkpointed"
        )
    liger = "on" if settings.use_liger_kernel else "off"
    return (
        f"{settings.model_name_or_path}, weights in {weights}, {training}; {rows} "
        f"of {settings.max_length:,} tokens a pass, {steps} a step; "
        f"{settings.attn_implementation}, Liger {liger}, activations {activations}; {settings.optim}"
    )


def describe_segment(at: str) -> str:
    """Return where in a step the peak is, in words: "later backward -1" is the backward of the last layer."""
    if at == "optimizer step":
        return at
    name, direction, *place = at.split()
    words = f"{direction} of the {' '.join(place) or 'embedding'}"
    if place and place[0] != "head":
        number = place[0]
        layers = {"0": "first layer", "-1": "last layer", "between": "layers between"}
        words = f"{direction} of {layers.get(number, f'layer {number}')}"
    if name == "later":
        words += ", gradients of earlier passes there"
    return words


def print_parts(console: Console, prediction: "Prediction") -> None:
    print_line(console, f"peak       predicted a GPU, in the {describe_segment(prediction.at)}")
    table = Table("part", "GiB")
    table.columns[1].justify = "right"
    for part, size in prediction.parts.items():
        if size > 0:
            table.add_row(part, f"{size / 2**30:.2f}")
    table.add_row("peak", f"{prediction.peak / 2**30:.2f}", style="bold")
    if prediction.paged:
        table.add_row("paged optimizer states, which torch does not count", f"{prediction.paged / 2**30:.2f}")
    console.print(table)


def print_advice(
    console: Console, title: str, chosen: list["Advice"], prediction: "Prediction", speed: "Speed"
) -> None:
    table = Table("", "flags", "peak", "memory", "tokens/s", "what else", title=title)
    for column in (2, 3, 4):
        table.columns[column].justify = "right"
    for number, advice in enumerate(chosen, start=1):
        saved = advice.saved(prediction)
        memory = f"-{gib(saved)}" if saved >= 0 else f"+{gib(-saved)}"
        gain = f"x {advice.gain(speed):.2f}"
        table.add_row(str(number), advice.change.flags, gib(advice.prediction.peak), memory, gain, advice.change.note)
    console.print(table)


def print_speed(console: Console, run: Run, speed: "Speed", card: Card, args: argparse.Namespace) -> None:
    settings = run.settings
    cards = f"{run.engine.processes} x {card.name}" if run.engine.processes > 1 else card.name
    print_line(console, f"speed      {describe_speed(speed)} tokens/s on {cards}, predicted by counting")
    rows = args.rows or ROWS
    length = mean_tokens(settings, args)
    shortest, longest = speed.seconds(rows * length * run.epochs)
    span = f"{describe_seconds(shortest)} to {describe_seconds(longest)}"
    epochs = count(run.epochs, "epoch")
    text = f"time       {span} for {rows:,} rows of {length:,} tokens, {epochs}, without evaluations and saves"
    if not args.rows:
        text += " (--rows and --tokens_per_row say yours)"
    print_line(console, text)


def describe_share(share: tuple[float, float]) -> str:
    """Return a range of shares as "2% to 4%", or "2%" where both are one."""
    low, high = (f"{round_figure(100 * bound):g}%" for bound in share)
    return low if low == high else f"{low} to {high}"


def print_costs(console: Console, run: Run, prediction: "Prediction", card: Card) -> None:
    """Print what optimizers keep, and what evaluations and saves cost."""
    from data_prep.common.gpu_costs import DISK, compare_optimizers, cost_of_evaluations, cost_of_saves

    words = []
    for cost in compare_optimizers(prediction):
        place = " in pages" if cost.paged else ""
        words.append(f"{cost.optim} {gib(cost.total)}{place}")
    trained = prediction.counts.trained / 1e6
    print_line(console, f"optimizer  states of {trained:,.0f}M trained weights: {', '.join(words)}")
    evaluation = cost_of_evaluations(prediction, card, run.schedule)
    if evaluation is not None:
        fast, slow = evaluation.seconds
        print_line(
            console,
            f"evaluation {fast:.2g} to {slow:.2g} s for {run.schedule.tokens:,} tokens: every {evaluation.steps} steps "
            f"{describe_share(evaluation.share)} of their time",
        )
    save = cost_of_saves(prediction, card, run.schedule)
    if save is not None:
        print_line(
            console,
            f"save       {save.size / 1e9:.2g} GB, {save.seconds[0]:.2g} s at {DISK / 1e9:g} GB/s, written and read "
            f"once: every {save.steps} steps {describe_share(save.share)} of their time",
        )


def print_run(run: Run, prediction: "Prediction", card: Card, args: argparse.Namespace) -> None:
    """Print the prediction of one run, and what to change."""
    from data_prep.common.gpu_advice import is_half_empty, longest_length, savings, spendings
    from data_prep.common.gpu_speed import predict_speed

    console = make_console(PIPE_WIDTH)
    print_line(console, f"run        {run.name}: {describe_settings(run)}")
    print_line(console, f"engine     {run.engine.describe()}")
    print_line(console, f"config     {run.config_source}")
    print_parts(console, prediction)
    console.print(describe_verdict(prediction, card), soft_wrap=True)
    speed = predict_speed(prediction, card)
    print_speed(console, run, speed, card, args)
    print_costs(console, run, prediction, card)
    if args.no_advice:
        return
    length = longest_length(run.settings, run.config, run.engine, card)
    if length is None:
        print_line(console, "length     no --max_length fits with these settings")
    else:
        print_line(console, f"length     --max_length {length} is the longest that surely fits with these settings")
    if not prediction.fits(card.gib):
        chosen = savings(run.settings, run.config, run.engine, card)
        print_advice(console, "too large: each of these by itself", chosen, prediction, speed)
    elif is_half_empty(prediction, card):
        chosen = spendings(run.settings, run.config, run.engine, card)
        print_advice(console, "half of the card is empty: each of these by itself fits", chosen, prediction, speed)


def print_line(console: Console, text: str) -> None:
    """Print a line as it stands: in a terminal rich would break it between words, in a file it would cut it."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


# -- other forms ------------------------------------------------------------------------------------------------------
def to_json(run: Run, prediction: "Prediction", card: Card) -> dict:
    """Return a prediction as plain values: bytes, tokens a second."""
    from data_prep.common.gpu_costs import compare_optimizers, cost_of_evaluations, cost_of_saves
    from data_prep.common.gpu_speed import predict_speed

    evaluation = cost_of_evaluations(prediction, card, run.schedule)
    save = cost_of_saves(prediction, card, run.schedule)
    return {
        "kind": "predicted",
        "recipe": run.recipe,
        "settings": asdict(run.settings),
        "engine": asdict(run.engine),
        "config_source": run.config_source,
        "card": asdict(card),
        "peak_bytes": round(prediction.peak),
        "parts_bytes": {part: round(size) for part, size in prediction.parts.items()},
        "paged_bytes": round(prediction.paged),
        "at": prediction.at,
        "needed_bytes": [round(size) for size in prediction.needed],
        "fits": prediction.fits(card.gib),
        "parameters": prediction.counts.parameters,
        "trained_parameters": prediction.counts.trained,
        "flops_per_token": prediction.work.flops / run.settings.tokens,
        "tokens_per_second": asdict(predict_speed(prediction, card)),
        "optimizer_bytes": {cost.optim: round(cost.total) for cost in compare_optimizers(prediction)},
        "evaluation": asdict(evaluation) if evaluation else None,
        "save": asdict(save) if save else None,
    }


def table_cell(prediction: "Prediction", card: Card) -> str:
    from data_prep.common.gpu_speed import predict_speed

    if not prediction.may_fit(card.gib):
        return "no"
    speed = describe_speed(predict_speed(prediction, card))
    return speed if prediction.fits(card.gib) else f"{speed} (tight)"


def make_table(runs: list[Run]) -> str:
    """Return cards x runs in Markdown: predicted peak a GPU, and tokens a second where it fits."""
    from data_prep.common.gpu_memory import predict

    cards = [CARDS[name] for name in TABLE]
    names = [f"{card.name} ({card.gib:.0f} GiB)" for card in cards]
    lines = [f"| run | GiB a GPU | {' | '.join(names)} |", "|---|---|" + "---|" * len(cards)]
    for run in runs:
        prediction = predict(run.settings, run.config, run.engine)
        cells = [table_cell(prediction, card) for card in cards]
        lines.append(f"| {run.name} | {prediction.peak / 2**30:.1f} | {' | '.join(cells)} |")
    notes = [
        "All predicted (`python -m eval.fit --table`): GiB as torch counts them, 0.3 to 0.8 more are needed;",
        "tokens/s of all GPUs, from and to, without what travels between them; no: does not fit.",
    ]
    return "\n".join([*lines, "", *notes])


# -- the command ------------------------------------------------------------------------------------------------------
def run_table(args: argparse.Namespace, flags: list[str]) -> int:
    wanted = TABLE_RUNS
    if args.recipe:
        wanted = [(args.recipe, flags, args.config_file)]
    runs = []
    for recipe, own, config_file in wanted:
        engine = read_engine(config_file, args.num_processes if args.recipe else None)
        runs.append(read_run(recipe, own, engine, args))
    print(make_table(runs))
    return 0


def run_fit(args: argparse.Namespace, flags: list[str]) -> int:
    """Print a prediction; return 1 where the run does not fit. Raises UsageError."""
    if not 0 < args.trained_share <= 1:
        raise UsageError(f"--trained_share {args.trained_share:g}: pass a share above 0, up to 1")
    if args.table:
        return run_table(args, flags)
    if args.recipe is None:
        raise UsageError("no recipe: pass a file like recipes/qwen3_qlora.py, or --table")
    if args.gpu is None:
        raise UsageError(f"no card: pass --gpu with one of {', '.join(CARDS)}")
    card = find_card(args.gpu)
    engine = read_engine(args.config_file, args.num_processes)
    run = read_run(args.recipe, flags, engine, args)

    from data_prep.common.gpu_memory import predict

    prediction = predict(run.settings, run.config, run.engine)
    if args.json:
        print(json.dumps(to_json(run, prediction, card), indent=2))
    else:
        print_run(run, prediction, card, args)
    return 0 if prediction.may_fit(card.gib) else 1


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("recipe", nargs="?", help="the file; flags that are not this command's follow it")
    parser.add_argument("--gpu", help=f"one of {', '.join(CARDS)}")
    parser.add_argument("--config_file", help="as for accelerate launch")
    parser.add_argument("--num_processes", type=positive, help="GPUs, as for accelerate launch")
    parser.add_argument("--rows", type=positive, help=f"of the training set, for the time of the run (default: {ROWS})")
    parser.add_argument("--tokens_per_row", type=positive, help="mean, for attention in packs and the time of the run")
    parser.add_argument("--trained_share", type=float, default=1.0, help="of the tokens (default: 1)")
    parser.add_argument("--no_advice", action="store_true", help="the prediction alone")
    parser.add_argument("--table", action="store_true", help="cards x recipes, in Markdown")
    parser.add_argument("--json", action="store_true", help="the prediction as JSON")
    args, flags = parser.parse_known_args(argv)

    def run(args: argparse.Namespace) -> int:
        return run_fit(args, flags)

    return command("fit.py", run, args)


if __name__ == "__main__":
    sys.exit(main())
