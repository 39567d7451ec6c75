"""The card of a run: README.md of its folder, for the hub and for whoever finds the model.

    python -m eval.card runs/qwen3_qlora
    python -m eval.card runs/qwen3_qlora --check
    python -m eval.card --check_readme docs/measured.md

Model card in the hub's format (base model, data, results as its metadata) and run card: recipe and arguments, data,
versions, machine, loss curve, speed and memory, before and after, benchmarks, how to serve. It takes the place of the
README.md that TRL writes with every checkpoint, so make it last. What was not measured or not recorded says so. The
metadata names what is on the hub by its id and leaves out the rest: a base or data of this machine, and the results on
such data, stand in the text alone. Paths of this machine stay out of it, but for that of the run, which the commands
need: as it is typed where the card was made.

--check: exit 1 if the card is stale, naming what changed since: its metadata hold sha256 of

    recipe      the syntax tree of its source without docstrings, so that comments and layout count nothing: the run's
                copy, and the file of that name in recipes/
    template    the run's serving template, and that of the training template as it is now
    data        the hash in the data set's report.json, or the bytes of a data file
    config      the run's arguments
    results     report.json and eval/*.json

Hooks do not count: those that ship leave the trained weights alone in one process.

--check_readme: the measured rows of a README, by measured.json beside this file: its words, and hashes of the recipes,
templates and data programs that gave the figures. Exit 1 if the README says something else or one of these changed
since; after measuring again, --record NAME takes down the present files. null: measured before that was recorded.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data_prep.common.errors import UsageError
from data_prep.common.readers import is_hub_id
from data_prep.common.rendering import serving_template
from data_prep.common.run_folder import read_entries
from eval.common.scores import command, parser_of, write_files

REPO = Path(__file__).resolve().parents[1]
MEASURED = Path(__file__).with_name("measured.json")
NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "deepspeed")
PARTS = {  # of a card's fingerprint, in words
    "recipe": "recipe",
    "template": "chat template",
    "data": "training data",
    "config": "config.yaml",
    "results": "measurements (report.json, eval/*.json)",
}
BENCHMARK_SETS = {  # the hub's data set of a benchmark, or of a metric of one that has several
    "aime25": "math-ai/aime25",
    "arc_challenge": "allenai/ai2_arc",
    "arc_easy": "allenai/ai2_arc",
    "gpqa_diamond_cot_zeroshot": "Idavidrein/gpqa",
    "gsm8k": "openai/gsm8k",
    "gsm8k_chat": "openai/gsm8k",
    "humaneval": "openai/openai_humaneval",
    "ifeval": "google/IFEval",
    "minerva_math500": "HuggingFaceH4/MATH-500",
    "mmlu": "cais/mmlu",
}
DATA_METRICS = {"reference_tokens"}  # of a report: they say something of the data, not of a model
DATA_LABELS = ("reference length",)  # the same in report.md
COUNTS = ("questions", "total", "tokens", "fields", "rows")  # what a figure's n is called


# -- hashes -----------------------------------------------------------------------------------------------------------
def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def code_hash(source: str) -> str:
    """Return the sha256 of what Python source does: its syntax tree without docstrings, alike in each Python."""
    return sha256(json.dumps(strip_node(ast.parse(source))))


def strip_node(node: object) -> object:
    """Return a node of a syntax tree as JSON, without places, empty fields and docstrings."""
    if isinstance(node, list):
        return [strip_node(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {}
    for name, value in ast.iter_fields(node):
        if value is not None and value != []:
            fields[name] = value
    has_docstring = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    if has_docstring and "body" in fields and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    return [type(node).__name__, {name: strip_node(value) for name, value in fields.items()}]


def file_hash(path: Path) -> str:
    """Return the sha256 of what a file says: of Python the code, of YAML the values, of others the bytes.

    Raises UsageError where it cannot be read.
    """
    try:
        if path.suffix == ".py":
            return code_hash(path.read_text(encoding="utf-8"))
        if path.suffix == ".yaml":
            return sha256(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True))
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, SyntaxError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read ({error}): repair it") from None


# -- the run folder ---------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """A run folder and what it holds: its config, its copy of the recipe, compare's report, the reports of benchmarks
    by name, versions of packages, what it noted of its machine."""

    folder: Path
    config: dict
    recipe: Path
    report: dict
    benchmarks: list[dict]
    versions: dict
    machine: dict

    @property
    def is_adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()

    @property
    def base(self) -> str:
        return str(self.config["model_name_or_path"])

    @property
    def data(self) -> str:
        return str(self.config.get("dataset_name"))


def read_json(path: Path) -> dict:
    """Return what a JSON file holds, {} where there is none. Raises UsageError."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): write it again") from None


def read_run(folder: Path) -> Run:
    """Return a run folder. Raises UsageError where it is none."""
    if not (folder / "config.yaml").is_file():
        raise UsageError(f"{folder} has no config.yaml: pass the folder of a run that a recipe wrote")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    benchmarks = []
    for path in sorted((folder / "eval").glob("*.json")):
        benchmark = read_json(path)
        if "metrics" in benchmark:
            benchmarks.append(benchmark)
    return Run(
        folder=folder,
        config=config,
        recipe=find_recipe(folder),
        report=read_json(folder / "report.json"),
        benchmarks=benchmarks,
        versions=read_json(folder / "versions.json"),
        machine=read_json(folder / "machine.json"),
    )


def find_recipe(folder: Path) -> Path:
    """Return a run's copy of its recipe. Raises UsageError."""
    found = [path for path in sorted(folder.glob("*.py")) if "DEFAULTS" in path.read_text(encoding="utf-8")]
    if len(found) != 1:
        raise UsageError(f"{folder} holds {len(found)} recipes: leave the one that it was trained with")
    return found[0]


def locate(name: str, folder: str = "") -> Path | None:
    """Return a path of config.yaml as it is found from here, from the repository or, by its name, in a folder there."""
    places = [Path(name), REPO / name]
    if folder:
        places.append(REPO / folder / Path(name).name)
    for place in places:
        if place.exists():
            return place
    return None


def hub_id(name: str) -> str | None:
    """Return the hub id of a model or data set, without config and split; None of what lies, or lay, in a folder."""
    if locate(name) or (REPO / name).parent.is_dir() or not is_hub_id(name):
        return None
    return re.split("[:@]", name)[0]


def name_source(name: str) -> str:
    """Return how a text names a model or data set: by its hub id, else by its folder's name."""
    return hub_id(name) or Path(name).name


@dataclass
class Fingerprint:
    """The sha256 of each part that can be hashed: of the run folder, and of the same parts outside it now."""

    inside: dict[str, str]
    outside: dict[str, str]

    def parts(self) -> set[str]:
        return self.inside.keys() | self.outside.keys()

    def of(self, part: str) -> set[str]:
        """Return the different hashes of a part."""
        return {hashes[part] for hashes in (self.inside, self.outside) if part in hashes}


def take_fingerprint(run: Run) -> Fingerprint:
    inside = {"recipe": file_hash(run.recipe), "config": sha256(json.dumps(run.config, sort_keys=True))}
    outside = {}
    template = run.folder / "chat_template.jinja"
    if template.is_file():
        inside["template"] = file_hash(template)
    results = [run.folder / "report.json", *sorted((run.folder / "eval").glob("*.json"))]
    hashes = [file_hash(path) for path in results if path.is_file()]
    if hashes:
        inside["results"] = sha256("".join(hashes))
    source = REPO / "recipes" / run.recipe.name
    if source.is_file():
        outside["recipe"] = file_hash(source)
    training_template = locate(str(run.config.get("chat_template_path")), "chat_templates")
    if training_template:
        outside["template"] = sha256(serving_template(training_template.read_text(encoding="utf-8")))
    data_hash = hash_data(run.data)
    if data_hash:
        outside["data"] = data_hash
    return Fingerprint(inside, outside)


def hash_data(name: str) -> str | None:
    """Return the hash in a data set's report.json, else that of a data file, None where there is neither."""
    data = locate(name)
    if data is None:
        return None
    if data.is_dir():
        return read_json(data / "report.json").get("hash")
    return read_json(data.with_suffix(".report.json")).get("hash") or file_hash(data)


def read_defaults(source: str) -> dict:
    """Return {name: value} of a recipe's DEFAULTS that stand there as they are; what is computed there is left out."""
    defaults = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign) or getattr(node.targets[0], "id", "") != "DEFAULTS":
            continue
        for keyword in node.value.keywords:
            try:
                defaults[keyword.arg] = ast.literal_eval(keyword.value)
            except ValueError:
                continue
    return defaults


def hide_paths(value: object) -> object:
    """Return a value of the config without this machine's folders: of a path outside the working folder its name."""
    if isinstance(value, list):
        return [hide_paths(item) for item in value]
    if isinstance(value, dict):
        return {key: hide_paths(item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith(("/", "~", "..", "\\")):
        return Path(value).name
    return value


# -- what the card says -----------------------------------------------------------------------------------------------
def make_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty one."""
    lines = []
    for cells in (header, ["---"] * len(header), *rows):
        escaped = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return [*lines, ""]


def type_path(path: Path) -> str:
    """Return a path as one types it in a shell of the working folder."""
    return shlex.quote(os.path.relpath(path))


def type_module(name: str) -> str:
    """Return what runs a command of this repository from the working folder."""
    if Path.cwd() == REPO:
        return f"python -m {name}"
    return f"PYTHONPATH={type_path(REPO)} python -m {name}"


def list_training_figures(run: Run) -> list[tuple[str, str, str]]:
    """Return (what, figure, n) of what a run logged; n: how many entries of the log a figure is made of."""
    entries = read_entries(run.folder)

    def of_last(label: str, name: str, form: str) -> tuple[str, str, str]:
        values = list_values(entries, name)
        if not values:
            return label, NOT_RECORDED, ""
        return label, format(values[-1], form), "1"

    def of_all(label: str, name: str, summary: str, form: str, unit: str = "") -> tuple[str, str, str]:
        values = list_values(entries, name)
        if not values:
            return label, NOT_RECORDED, ""
        value = {"max": max, "sum": sum, "median": median}[summary](values)
        return label, format(value, form) + unit, f"{len(values):,}"

    return [
        of_last("optimizer steps", "step", ","),
        of_last("epochs", "epoch", ".2f"),
        of_last("training loss, last logged", "loss", ".4f"),
        of_last("validation loss, last", "eval_loss", ".4f"),
        of_all("trained tokens", "trained_tokens", "max", ",.0f"),
        of_all("tokens/s, median", "tokens_per_second", "median", ",.0f"),
        of_all("MFU, median", "mfu", "median", ".1%"),
        of_all("peak memory", "memory_gib", "max", ".1f", " GiB"),
        of_all("training time", "train_runtime", "sum", ",.0f", " s"),
    ]


def list_values(entries: list[dict], name: str) -> list[float]:
    return [entry[name] for entry in entries if isinstance(entry.get(name), (int, float))]


def list_machine(run: Run, hardware: str | None) -> list[tuple[str, str, str]]:
    """Return (what, which, "") of the machine that trained, as recipes/hooks noted it; hardware: what to say instead.

    Of a run that noted no memory it is that of this machine, and says so.
    """
    engine = run.folder / "engine.txt"
    if hardware is None and engine.is_file():
        hardware = "; then ".join(engine.read_text(encoding="utf-8").splitlines())
    ram = NOT_RECORDED
    if run.machine.get("ram_gib") is not None:
        ram = f"{run.machine['ram_gib']:.1f} GiB"
    elif hasattr(os, "sysconf"):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        ram = f"{NOT_RECORDED}; {size:.1f} GiB where this card was made"
    return [
        ("hardware", hardware or NOT_RECORDED, ""),
        ("RAM", ram, ""),
        ("CUDA", find_cuda(run), ""),
    ]


def find_cuda(run: Run) -> str:
    """Return the version of CUDA that a run noted, else the one that its torch was built for."""
    if "cuda" in run.machine:
        return run.machine["cuda"] or "none"
    build = run.versions.get("torch", "").partition("+")[2]
    number = re.fullmatch(r"cu(\d+)(\d)", build)
    if number:
        return f"{number[1]}.{number[2]}"
    return "none" if build == "cpu" else NOT_RECORDED


def count_of(figure: dict) -> int | None:
    """Return the n of a figure."""
    for name in COUNTS:
        if name in figure:
            return figure[name]
    return None


def find_tuned(run: Run) -> dict:
    """Return compare's metrics of the tuned model over all rows, {} where there are none."""
    if not run.report:
        return {}
    models = run.report["results"]["overall"]["all"]
    return models.get("tuned") or models.get(run.folder.name) or {}


def list_results(run: Run) -> list[EvalResult]:
    """Return the results for the metadata: those on data of the hub, each with its n."""
    results = []
    settings = run.report.get("settings", {})
    measured = hub_id(str(settings.get("data")))
    for metric, figure in find_tuned(run).items():
        if measured and metric not in DATA_METRICS:
            results += make_result(measured, settings["data"], settings.get("split"), metric, figure)
    for benchmark in run.benchmarks:
        name = benchmark["benchmark"]
        for metric, figure in benchmark["metrics"].items():
            dataset = BENCHMARK_SETS.get(name.removesuffix("_think")) or BENCHMARK_SETS.get(metric)
            if dataset:
                results += make_result(dataset, name, None, metric, figure)
    return results


def make_result(dataset: str, name: str, split: str | None, metric: str, figure: dict) -> list[EvalResult]:
    """Return a result in the hub's form, none of a figure without a value."""
    if not isinstance(figure.get("value"), (int, float)):
        return []
    arguments = None
    if count_of(figure) is not None:
        arguments = {"n": count_of(figure)}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=name,
            dataset_split=split,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=round(figure["value"], 4),
            metric_args=arguments,
        )
    ]


def list_benchmark_rows(benchmark: dict) -> list[tuple[str, str, str]]:
    """Return (metric, value with its interval, n) of a benchmark's figures."""
    rows = []
    for metric, figure in benchmark["metrics"].items():
        value = f"{figure['value']:.4g}"
        if "low" in figure:
            value += f" ({figure['low']:.4g}–{figure['high']:.4g})"
        count = count_of(figure)
        rows.append((metric, value, NOT_RECORDED if count is None else f"{count:,}"))
    return rows


def describe_data(run: Run) -> list[str]:
    """Return lines about the training data: the data set's own report and card."""
    line = f"`{name_source(run.data)}`"
    folder = locate(run.data)
    report = {}
    if folder and folder.is_dir():
        report = read_json(folder / "report.json")
    if not report:
        return [line, "", f"Its counts are {NOT_RECORDED}: it has no report.json of data_prep.", ""]
    written = ", ".join(f"{part} {count:,}" for part, count in report["out"].items())
    refused = ", ".join(f"{reason} {count:,}" for reason, count in report["refused"].items()) or "none"
    lines = [f"{line}, made by {report['script']} from {report['in']:,} rows: {written}; refused: {refused}."]
    if (folder / "card.md").is_file():
        lines += ["", *list_table_lines(folder / "card.md")]
    return [*lines, ""]


def list_table_lines(path: Path) -> list[str]:
    """Return the lines of a Markdown file's tables, without what is a property of the data."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and not any(label in line for label in DATA_LABELS):
            lines.append(line)
    return lines


def describe_serving(run: Run) -> list[str]:
    folder = type_path(run.folder)
    if not run.is_adapter:
        return ["```", f"transformers serve {folder}", "```", ""]
    merged = type_path(run.folder / "merged")
    merge = f"{type_module('eval.merge')} {folder} --out {merged}"
    return ["```", merge, f"transformers serve {merged}", "```", ""]


def describe_change(run: Run) -> list[str]:
    """Return lines about the model before and after: compare's table, or the command that makes it."""
    table = run.folder / "report.md"
    if run.report and table.is_file():
        settings = run.report["settings"]
        line = (
            f"{run.report['rows']['measured']:,} rows of {settings['data']} ({settings['split']}), greedy, at most "
            f"{settings['max_new_tokens']} tokens, {settings['dtype']} on {settings['device']}; 95% intervals."
        )
        return [line, "", *list_table_lines(table), ""]
    base = hub_id(run.base) or run.base
    if locate(run.base):
        base = type_path(locate(run.base))
    elif not hub_id(run.base):
        base = "BASE"
    data = "--data VALIDATION.jsonl"
    folder = locate(run.data)
    for split in ("test", "validation"):
        if folder and (folder / split).is_dir():
            data = f"--data {type_path(folder)} --split {split}"
            break
    measure = f"{type_module('eval.compare')} --base {base} --tuned {type_path(run.folder)} {data}"
    return [f"{NOT_MEASURED}: {measure}", ""]


def describe_benchmarks(run: Run) -> list[str]:
    if not run.benchmarks:
        return [f"{NOT_MEASURED}.", ""]
    lines = []
    for benchmark in run.benchmarks:
        table = make_table(["metric", "value (95%)", "n"], list_benchmark_rows(benchmark))
        lines += [f"**{benchmark['benchmark']}**", "", *table]
    return lines


def describe_gate(run: Run) -> str:
    gate = read_json(run.folder / "gate.json")
    verdict = NOT_MEASURED
    if gate:
        verdict = "passed" if gate["passed"] else "failed"
    return f"Gate (`{type_module('eval.gate')} {type_path(run.folder)}`): {verdict}."


def describe_training(run: Run, hardware: str | None) -> list[str]:
    lines = make_table(["what", "figure", "n"], [*list_machine(run, hardware), *list_training_figures(run)])
    if (run.folder / "loss.png").is_file():
        lines += ["![loss](loss.png)", ""]
    defaults = read_defaults(run.recipe.read_text(encoding="utf-8"))
    changed = []
    for key, value in sorted(run.config.items()):
        if defaults.get(key) != value:
            changed.append((key, hide_paths(defaults.get(key, "")), hide_paths(value)))
    lines += [f"Arguments that differ from the DEFAULTS of `{run.recipe.name}` (all are in config.yaml):", ""]
    return lines + make_table(["argument", "DEFAULTS", "this run"], changed)


def make_metadata(run: Run, license_id: str | None, hashes: dict[str, str]) -> ModelCardData:
    """Return the card's metadata; of what is not on the hub it names nothing."""
    data = hub_id(run.data)
    return ModelCardData(
        base_model=hub_id(run.base),
        datasets=[data] if data else None,
        library_name="peft" if run.is_adapter else "transformers",
        license=license_id,
        model_name=run.folder.name,
        pipeline_tag="text-generation",
        tags=["trl", "sft", "lora"] if run.is_adapter else ["trl", "sft"],
        eval_results=list_results(run) or None,
        run_card=hashes,
    )


def make_card(run: Run, license_id: str | None, hardware: str | None) -> str:
    """Return the text of the card."""
    fingerprint = take_fingerprint(run)
    hashes = {}
    for part in PARTS:
        if part in fingerprint.parts():
            hashes[part] = fingerprint.inside.get(part) or fingerprint.outside[part]
    kind = "LoRA adapter" if run.is_adapter else "model"
    licence = f"licence {NOT_RECORDED}, that of the base model binds"
    if license_id:
        licence = f"licence {license_id}"
    trained = f"from `{name_source(run.base)}` on `{name_source(run.data)}` by `{run.recipe.name}` (SFT Recipes, TRL)"
    versions = [f"{name} {run.versions.get(name, NOT_RECORDED)}" for name in PACKAGES]
    check = f"{type_module('eval.card')} {type_path(run.folder)} --check"
    lines = [
        f"# {run.folder.name}",
        "",
        f"A {kind} trained {trained}; {licence}.",
        "",
        "## Serve",
        "",
        *describe_serving(run),
        "## Before and after",
        "",
        *describe_change(run),
        "## Benchmarks",
        "",
        *describe_benchmarks(run),
        describe_gate(run),
        "",
        "## Training",
        "",
        *describe_training(run, hardware),
        "## Data",
        "",
        *describe_data(run),
        "## Versions",
        "",
        ", ".join(versions),
        "",
        "## Is this card up to date?",
        "",
        f"`{check}` compares it with the recipe, template, data, arguments and results that it was made from:",
        "",
        *make_table(["part", "sha256"], [(part, hashes.get(part, NOT_RECORDED)) for part in PARTS]),
    ]
    metadata = make_metadata(run, license_id, hashes)
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines)


# -- stale? -----------------------------------------------------------------------------------------------------------
def find_stale_parts(folder: Path) -> Iterator[str]:
    """Yield what changed since the card of a run was made, a sentence each. Raises UsageError where it has none."""
    path = folder / "README.md"
    card = None
    if path.is_file():
        card = ModelCard.load(path).data.to_dict().get("run_card")
    if not card:
        raise UsageError(
            f"{folder} has no card of ours: python -m eval.card {folder} writes it (TRL's own is no run card)"
        )
    fingerprint = take_fingerprint(read_run(folder))
    for part, digest in card.items():
        found = fingerprint.of(part)
        if not found:
            print(f"not checked: the {PARTS[part]} is not found here")
        elif found != {digest}:
            yield f"stale: the {PARTS[part]} is not that of the card"
    added = sorted(fingerprint.parts() - card.keys())
    if added:
        yield f"stale: the card was made without the {' and the '.join([PARTS[part] for part in added])}"


def record_row(rows: list[dict], name: str) -> None:
    """Take down the present files of a row of measured.json. Raises UsageError."""
    names = [row["name"] for row in rows]
    if name not in names:
        raise UsageError(f"{MEASURED.name} has no row {name!r}: pass one of {', '.join(names)}")
    for row in rows:
        if row["name"] == name:
            row["inputs"] = {path: file_hash(REPO / path) for path in row["inputs"]}
    write_files(MEASURED.parent, {MEASURED.name: json.dumps(rows, indent=1, ensure_ascii=False) + "\n"})


def find_stale_rows(readme: Path, rows: list[dict]) -> Iterator[str]:
    """Yield what does not hold of the rows of measured.json, a sentence each."""
    text = readme.read_text(encoding="utf-8")
    for row in rows:
        name = row["name"]
        for words in row["readme"]:
            if words not in text:
                yield f"{name}: {readme.name} does not say what was measured: {words}"
        if None in row["inputs"].values():
            print(f"{name}: measured before its inputs were recorded; after measuring again, --record does")
            continue
        for path, digest in row["inputs"].items():
            if file_hash(REPO / path) != digest:
                yield f"{name} was measured with another {path}: measure again, then --record {name!r}"


# -- the command ------------------------------------------------------------------------------------------------------
def check_or_write(args: argparse.Namespace) -> int:
    if args.check_readme:
        if not args.check_readme.is_file():
            raise UsageError(f"{args.check_readme} does not exist: pass the README")
        rows = json.loads(MEASURED.read_text(encoding="utf-8"))
        if args.record:
            record_row(rows, args.record)
        return print_stale(find_stale_rows(args.check_readme, rows))
    if not args.run or not args.run.is_dir():
        raise UsageError(f"{args.run or 'no run folder'} is not there: pass a run folder")
    folder = args.run.resolve()
    if args.check:
        return print_stale(find_stale_parts(folder))
    out = args.out or folder / "README.md"
    write_files(out.parent, {out.name: make_card(read_run(folder), args.license, args.hardware)})
    print(f"wrote {out.name}")
    return 0


def print_stale(sentences: Iterator[str]) -> int:
    """Print what is stale, or that nothing is; return the exit code."""
    found = list(sentences)
    for sentence in found or ["up to date"]:
        print(sentence)
    return int(bool(found))


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="where the card goes (default: README.md of the run folder)")
    parser.add_argument("--license", help="its id on the hub (apache-2.0, …), where you know it")
    parser.add_argument("--hardware", help="instead of the engine and device that the run noted")
    parser.add_argument("--check", action="store_true", help="exit 1 if the card is stale")
    parser.add_argument("--check_readme", type=Path, metavar="README", help="exit 1 if its measured rows are stale")
    parser.add_argument("--record", metavar="NAME", help="with --check_readme: this row was measured again")
    return command("card.py", check_or_write, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
