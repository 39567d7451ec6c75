"""What eval.first_contact runs: recipes with their flags, the parts in their order, and what becomes of each.

Nothing here imports torch.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
STEPS = 6
TINY_STEPS = 4
TINY = "tiny"  # the model of --tiny
TINY_FLAGS = ("--use_cpu", "true", "--dtype", "float32", "--bf16", "false", "--max_length", "128")
KILLED = "killed and resumed"
PACKED = "packed rows"
ATTENTIONS = ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "flex_attention", "sdpa")


@dataclass(frozen=True)
class Run:
    """A run of a recipe.

    model: a name of data_prep/common/known_configs, or TINY. attention: what must be installed for it.
    """

    name: str
    recipe: str
    model: str
    flags: tuple[str, ...] = ()
    attention: str | None = None


QLORA = Run("qwen3_qlora", "qwen3_qlora", "Qwen/Qwen3-4B")
LORA = Run("qwen3_lora", "qwen3_lora", "Qwen/Qwen3-8B")
FULL = Run("qwen3_full", "qwen3_full", "Qwen/Qwen3-4B")
LONGER = ("--max_length", "8192")
README_RUNS = 3
DETERMINISTIC = ("--full_determinism", "true")


def vary(run: Run, *flags: str, model: str | None = None, attention: str | None = None) -> Run:
    """Return a run with more flags or another model, named by them."""
    words = [run.name, *flags]
    if model is None:
        model = run.model
    else:
        words.append(model.split("/")[-1])
    name = " ".join(words)
    return replace(run, name=name, flags=run.flags + flags, model=model, attention=attention)


def list_runs(is_tiny: bool) -> list[Run]:
    """Return the runs that are measured, the README's three recipes first."""
    if is_tiny:
        base = replace(QLORA, model=TINY, flags=TINY_FLAGS)
        return [base, vary(base, *DETERMINISTIC)]
    runs = [QLORA, LORA, FULL]
    for attention in ATTENTIONS:
        runs.append(vary(QLORA, "--attn_implementation", attention, attention=attention))
    runs.append(vary(QLORA, "--use_liger_kernel", "false"))
    runs.append(vary(QLORA, *LONGER))
    runs.append(vary(LORA, *LONGER))
    runs.append(vary(QLORA, model="Qwen/Qwen3-8B"))
    runs.append(vary(QLORA, *DETERMINISTIC))
    return runs


@dataclass
class Predicted:
    """What eval.fit says of a run. tokens_per_second: from and to, None for a card that is not in gpu_cards."""

    peak_gib: float
    needed_gib: float
    fits: bool
    tokens_per_second: tuple[float, float] | None = None


@dataclass
class Survey:
    """The machine.

    attention: the recipes' choice. attentions: why one cannot be tried, "" where it can. predicted: by run, of those
    that have a prediction.
    """

    gpu: str | None
    gib: float
    driver: str
    attention: str
    versions: dict[str, str]
    attentions: dict[str, str]
    predicted: dict[str, Predicted]


@dataclass
class Part:
    """A step of the whole: what it is for, and the run that it is about. kind: packed, run or resume."""

    name: str
    kind: str
    run: Run
    attention: str = ""


@dataclass
class Result:
    """What became of a part. state: done, failed, left out or interrupted; figures: by name, of its kind."""

    name: str
    kind: str
    state: str
    why: str = ""
    seconds: float = 0.0
    recipe: str = ""
    flags: list[str] = field(default_factory=list)
    figures: dict[str, object] = field(default_factory=dict)
    predicted: Predicted | None = None


def list_parts(runs: list[Run], survey: Survey) -> list[Part]:
    """Return the parts in their order: what the README says first, then what explains it."""
    parts = []
    names = ATTENTIONS if survey.gpu else ("sdpa",)
    for attention in names:
        parts.append(Part(f"{PACKED}: {attention}", "packed", runs[0], attention))
    first = runs[:README_RUNS]
    parts += [Part(run.name, "run", run) for run in first]
    parts.append(Part(f"{KILLED}: {runs[0].name}", "resume", runs[0]))
    parts += [Part(run.name, "run", run) for run in runs[README_RUNS:]]
    parts.append(Part(f"{KILLED}: {runs[-1].name}", "resume", runs[-1]))
    return parts


def model_folder(out: Path, model: str) -> Path:
    return out / "models" / model.split("/")[-1]


def recipe_path(run: Run) -> str:
    return str(REPO / "recipes" / f"{run.recipe}.py")


def common_flags(run: Run, out: Path) -> list[str]:
    """Return the flags that decide a run's memory and speed: 4 packs a step, the run's own last."""
    batch = 2 if run.model == TINY else 4
    return ["--model_name_or_path", str(model_folder(out, run.model)), "--global_batch_size", str(batch), *run.flags]


def launch_flags(run: Run, out: Path, folder: Path) -> list[str]:
    """Return all flags of a run into a folder; adapters are saved halfway, so that a killed run can go on."""
    steps = TINY_STEPS if run.model == TINY else STEPS
    flags = [*common_flags(run, out), "--dataset_name", str(out / "rows.jsonl"), "--output_dir", str(folder)]
    flags += ["--max_steps", str(steps), "--eval_rows", "0", "--eval_strategy", "no", "--disable_tqdm", "true"]
    if run.recipe == FULL.recipe:
        return [*flags, "--save_strategy", "no"]
    return [*flags, "--save_strategy", "steps", "--save_steps", str(steps // 2)]
