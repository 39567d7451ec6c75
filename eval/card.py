"""The card of a run: README.md of its folder, for the hub and for whoever finds the model.

    python -m eval.card runs/qwen3_qlora
    python -m eval.card runs/qwen3_qlora --check
    python -m eval.card --check_readme README.md

Model card in the hub's format (base model, data, results as its metadata) and run card: recipe and arguments, data,
versions, loss curve, speed and memory, before and after, benchmarks, how to serve. It takes the place of the README.md
that TRL writes with every checkpoint, so make it last. What was not measured or not recorded says so; paths of this
machine stay out of it.

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

import ast
import hashlib
import json
import re
import sys
from pathlib import Path
from statistics import median

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data_prep.common.errors import UsageError
from eval.common.scores import command, parser_of, write_files

REPO = Path(__file__).resolve().parents[1]
MEASURED = Path(__file__).with_name("measured.json")
NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes", "deepspeed")
PARTS = {  # of a card's fingerprint, in words
    "recipe": "recipe",
    "template": "chat template",
    "data": "training data",
    "config": "config.yaml",
    "results": "measurements (report.json, eval/*.json)",
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


# -- hashes ------------------------------------------------------------------------------------------------------------
def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def code_hash(source):
    """sha256 of what Python source does: its syntax tree without docstrings, written so that each Python agrees."""

    def plain(node):
        if isinstance(node, list):
            return [plain(one) for one in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
        if "body" in fields and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            fields["body"] = fields["body"][ast.get_docstring(node, clean=False) is not None :]
        return [type(node).__name__, {name: plain(value) for name, value in fields.items()}]

    return sha256(json.dumps(plain(ast.parse(source))))


def file_hash(path):
    """sha256 of what a file says: of Python the code, of YAML the values, of others the bytes. Raises UsageError."""
    try:
        if path.suffix == ".py":
            return code_hash(path.read_text(encoding="utf-8"))
        if path.suffix == ".yaml":
            return sha256(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")), sort_keys=True))
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, SyntaxError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read ({error}): repair it") from None


def serving_template(template: str) -> str:
    """Turn generation markers into empty comments, as the function of this name in every recipe."""
    return re.sub(r"{%(\W?)\s*(?:end)?generation\s*(\W?)%}", r"{#\1 \2#}", template)


# -- the run folder ----------------------------------------------------------------------------------------------------
def read(path):
    """A JSON file, {} where there is none. Raises UsageError."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): write it again") from None


def read_config(run):
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run} has no config.yaml: pass the folder of a run that a recipe wrote")
    return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))


def recipe_of(run):
    """The run's copy of its recipe. Raises UsageError."""
    found = [path for path in sorted(run.glob("*.py")) if "DEFAULTS" in path.read_text(encoding="utf-8")]
    if len(found) != 1:
        raise UsageError(f"{run} holds {len(found)} recipes: leave the one that it was trained with")
    return found[0]


def locate(name, room=""):
    """A path of config.yaml as it is found from here, from the repository or, by its name, in a room; None if not."""
    places = [Path(name), REPO / name] + ([REPO / room / Path(name).name] if room else [])
    return next((place for place in places if place.exists()), None)


def fingerprint(run, config):
    """{part: sha256} of the run folder, and of the same parts as they are outside it now; a part that cannot be hashed
    or found there is left out."""
    recipe, template = recipe_of(run), run / "chat_template.jinja"
    inside = {"recipe": file_hash(recipe), "config": sha256(json.dumps(config, sort_keys=True)), "results": None}
    inside["template"] = file_hash(template) if template.is_file() else None
    if results := [path for path in (run / "report.json", *sorted((run / "eval").glob("*.json"))) if path.is_file()]:
        inside["results"] = sha256("".join(map(file_hash, results)))
    source, data = REPO / "recipes" / recipe.name, locate(str(config.get("dataset_name")))
    training = locate(str(config.get("chat_template_path")), "chat_templates")
    outside = {"recipe": file_hash(source) if source.is_file() else None}
    outside["template"] = sha256(serving_template(training.read_text(encoding="utf-8"))) if training else None
    if data:
        report = read(data / "report.json" if data.is_dir() else data.with_suffix(".report.json"))
        outside["data"] = report.get("hash") or (file_hash(data) if data.is_file() else None)
    return (*({part: digest for part, digest in parts.items() if digest} for parts in (inside, outside)),)


def defaults_of(source):
    """{name: value} of a recipe's DEFAULTS that stand there as they are; what is computed there is left out."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DEFAULTS":
            for keyword in node.value.keywords:
                try:
                    found[keyword.arg] = ast.literal_eval(keyword.value)
                except ValueError:
                    continue
    return found


def public(value):
    """A value of the config without this machine's folders: of a path outside the working folder its name only."""
    if isinstance(value, list):
        return [public(one) for one in value]
    if isinstance(value, dict):
        return {key: public(one) for key, one in value.items()}
    if isinstance(value, str) and value.startswith(("/", "~", "..", "\\")):
        return Path(value).name
    return value


def model_id(name):
    """The hub id of a model or data set, of a folder its name."""
    return name if HUB_ID.fullmatch(name) and not locate(name) else Path(name).name


# -- the card ----------------------------------------------------------------------------------------------------------
def table(header, rows):
    escape = str.maketrans({"|": "\\|", "\n": " "})
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).translate(escape) for cell in cells) + " |" for cells in lines] + [""]


def log_figures(run):
    """[(what, figure)] of log.jsonl, which recipes/hooks writes."""
    entries, path = [], run / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        entries += [json.loads(line)] if line.endswith("}") else []  # a killed run may have left half a line

    def series(name):
        return [entry[name] for entry in entries if isinstance(entry.get(name), (int, float))]

    def last(name, form):
        return format(series(name)[-1], form) if series(name) else NOT_RECORDED

    def over(name, of, form, unit=""):
        return format(of(series(name)), form) + unit if series(name) else NOT_RECORDED

    return [
        ("optimizer steps", last("step", ",")),
        ("epochs", last("epoch", ".2f")),
        ("training loss, last logged", last("loss", ".4f")),
        ("validation loss, last", last("eval_loss", ".4f")),
        ("trained tokens", over("trained_tokens", max, ",.0f")),
        ("tokens/s, median", over("tokens_per_second", median, ",.0f")),
        ("MFU, median", over("mfu", median, ".1%")),
        ("peak memory", over("memory_gib", max, ".1f", " GiB")),
        ("training time", over("train_runtime", sum, ",.0f", " s")),
    ]


def hardware_of(run):
    """What trained, as recipes/hooks wrote it down."""
    path = run / "engine.txt"
    return "; then ".join(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else NOT_RECORDED


def benchmarks(run):
    """The reports in eval/ of a run (scores.py), by name."""
    return [report for path in sorted((run / "eval").glob("*.json")) if "metrics" in (report := read(path))]


def results(report, reports):
    """EvalResults for the metadata: the tuned model's overall figures, and those of the benchmarks."""
    found = []
    sets = [(one["benchmark"], None, one["metrics"]) for one in reports]
    if report:
        settings = report["settings"]
        sets.insert(0, (settings["data"], settings["split"], report["results"]["overall"]["all"]["tuned"]))
    for name, split, metrics in sets:
        for metric, value in metrics.items():
            if isinstance(value.get("value"), (int, float)):
                found.append(EvalResult(
                    task_type="text-generation", dataset_type=name, dataset_name=name, dataset_split=split,
                    metric_type=metric, metric_name=metric.replace("_", " "), metric_value=round(value["value"], 4),
                ))  # fmt: skip
    return found


def data_card(config):
    """Lines about the training data: the data set's own report and card."""
    name, folder = str(config.get("dataset_name")), locate(str(config.get("dataset_name")))
    lines = [f"`{model_id(name)}`"]
    report = read(folder / "report.json") if folder and folder.is_dir() else {}
    if not report:
        return [*lines, "", "Its counts are " + NOT_RECORDED + ": it has no report.json of data_prep.", ""]
    split = ", ".join(f"{part} {count:,}" for part, count in report["out"].items())
    refused = ", ".join(f"{reason} {count:,}" for reason, count in report["refused"].items()) or "none"
    lines[0] += f", made by {report['script']} from {report['in']:,} rows: {split}; refused: {refused}."
    if (folder / "card.md").is_file():
        text = (folder / "card.md").read_text(encoding="utf-8")
        lines += ["", *(line for line in text.splitlines() if line.startswith("|"))]
    return [*lines, ""]


def serving_lines(run, adapter):
    """How to serve, from the repository's folder; run folders by their name."""
    name = f"runs/{run.name}"
    lines = [f"python -m eval.merge {name} --out {name}/merged", f"transformers serve {name}/merged"]
    return ["```", *(lines if adapter else [f"transformers serve {name}"]), "```", ""]


def make(run, license_id, hardware):
    """The text of the card."""
    config, recipe, report = read_config(run), recipe_of(run), read(run / "report.json")
    adapter, reports, versions = (run / "adapter_config.json").is_file(), benchmarks(run), read(run / "versions.json")
    base, data = model_id(config["model_name_or_path"]), model_id(str(config.get("dataset_name")))
    inside, outside = fingerprint(run, config)
    trained = {part: digest for part in PARTS if (digest := inside.get(part) or outside.get(part))}
    metadata = ModelCardData(
        base_model=base, datasets=[data], library_name="peft" if adapter else "transformers", license=license_id,
        model_name=run.name, pipeline_tag="text-generation", tags=["trl", "sft", *(["lora"] if adapter else [])],
        eval_results=results(report, reports) or None, run_card=trained,
    )  # fmt: skip
    defaults = defaults_of(recipe.read_text(encoding="utf-8"))
    settled = {key: value for key, value in config.items() if defaults.get(key) != value}
    changed = [(key, public(defaults.get(key, "")), public(value)) for key, value in sorted(settled.items())]
    kind = "LoRA adapter" if adapter else "model"
    licence = f"licence {license_id}" if license_id else f"licence {NOT_RECORDED}, that of the base model binds"
    lines = [f"# {run.name}", ""]
    lines += [f"A {kind} trained from `{base}` on `{data}` by `{recipe.name}` (SFT Recipes, TRL); {licence}.", ""]
    lines += ["## Serve", "", *serving_lines(run, adapter), "## Before and after", ""]
    before = run / "report.md"
    if report and before.is_file():
        settings, text = report["settings"], before.read_text(encoding="utf-8")
        lines += [
            f"{report['rows']['measured']:,} rows of {settings['data']} ({settings['split']}), greedy, at most "
            f"{settings['max_new_tokens']} tokens, {settings['dtype']} on {settings['device']}; 95% intervals."
        ]
        lines += ["", *(line for line in text.splitlines() if line.startswith("|")), ""]
    else:
        lines += [NOT_MEASURED + ": python -m eval.compare measures it.", ""]
    lines += ["## Benchmarks", ""]
    for one in reports:
        cells = [(name, f"{m['value']:.4g}" + (f" ({m['low']:.4g}–{m['high']:.4g})" if "low" in m else ""),
                  m.get("total", "")) for name, m in one["metrics"].items()]  # fmt: skip
        lines += [f"**{one['benchmark']}**", "", *table(["metric", "value (95%)", "n"], cells)]
    lines += [] if reports else [NOT_MEASURED + ".", ""]
    gate = read(run / "gate.json")
    verdict = {True: "passed", False: "failed"}[gate["passed"]] if gate else NOT_MEASURED
    lines += [f"Gate (python -m eval.gate): {verdict}.", "", "## Training", ""]
    lines += table(["what", "figure"], [("hardware", hardware or hardware_of(run)), *log_figures(run)])
    lines += ["![loss](loss.png)", ""] if (run / "loss.png").is_file() else []
    lines += [f"Arguments that differ from the DEFAULTS of `{recipe.name}` (all are in config.yaml):", ""]
    lines += table(["argument", "DEFAULTS", "this run"], changed)
    lines += ["## Data", "", *data_card(config), "## Versions", ""]
    lines += [", ".join(f"{name} {versions.get(name, NOT_RECORDED)}" for name in PACKAGES), ""]
    lines += ["## Is this card up to date?", "", f"`python -m eval.card runs/{run.name} --check` compares it with the "
              "recipe, template, data, arguments and results that it was made from:", ""]  # fmt: skip
    lines += table(["part", "sha256"], [(part, trained.get(part, NOT_RECORDED)) for part in PARTS])
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n".join(lines)


# -- stale? ------------------------------------------------------------------------------------------------------------
def stale(run):
    """What changed since the card of a run was made, a sentence each. Raises UsageError where it has none."""
    path = run / "README.md"
    card = ModelCard.load(path).data.to_dict().get("run_card") if path.is_file() else None
    if not card:
        raise UsageError(f"{run} has no card of ours: python -m eval.card {run} writes it (TRL's own is no run card)")
    inside, outside = fingerprint(run, read_config(run))
    for part, digest in card.items():
        found = {parts[part] for parts in (inside, outside) if part in parts}
        if not found:
            print(f"not checked: the {PARTS[part]} is not found here")
        elif found != {digest}:
            yield f"stale: the {PARTS[part]} is not that of the card"
    if new := sorted((inside.keys() | outside.keys()) - card.keys()):
        yield f"stale: the card was made without the {' and the '.join(PARTS[part] for part in new)}"


def stale_rows(readme, record):
    """What does not hold of the rows of measured.json, a sentence each; first takes down the files of one (record)."""
    rows, text = json.loads(MEASURED.read_text(encoding="utf-8")), readme.read_text(encoding="utf-8")
    if record:
        if record not in [row["name"] for row in rows]:
            raise UsageError(f"{MEASURED.name} has no row {record!r}: pass one of {', '.join(r['name'] for r in rows)}")
        for row in rows:
            if row["name"] == record:
                row["inputs"] = {name: file_hash(REPO / name) for name in row["inputs"]}
        write_files(MEASURED.parent, {MEASURED.name: json.dumps(rows, indent=1, ensure_ascii=False) + "\n"})
    for row in rows:
        for words in row["readme"]:
            if words not in text:
                yield f"{row['name']}: {readme.name} does not say what was measured: {words}"
        if None in row["inputs"].values():
            print(f"{row['name']}: measured before its inputs were recorded; after measuring again, --record does")
            continue
        for name, digest in row["inputs"].items():
            if file_hash(REPO / name) != digest:
                yield f"{row['name']} was measured with another {name}: measure again, then --record {row['name']!r}"


def card(args):
    if args.check_readme:
        if not args.check_readme.is_file():
            raise UsageError(f"{args.check_readme} does not exist: pass the README")
        found = list(stale_rows(args.check_readme, args.record))
    else:
        if not args.run or not args.run.is_dir():
            raise UsageError(f"{args.run or 'no run folder'} is not there: pass a run folder")
        run = args.run.resolve()
        if not args.check:
            text = make(run, args.license, args.hardware)
            out = args.out or run / "README.md"
            write_files(out.parent, {out.name: text})
            print(f"wrote {out.name}")
            return 0
        found = list(stale(run))
    print(*(found or ["up to date"]), sep="\n")
    return 1 if found else 0


def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="where the card goes (default: README.md of the run folder)")
    parser.add_argument("--license", help="its id on the hub (apache-2.0, …), where you know it")
    parser.add_argument("--hardware", help="instead of the engine and device that the run noted")
    parser.add_argument("--check", action="store_true", help="exit 1 if the card is stale")
    parser.add_argument("--check_readme", type=Path, metavar="README", help="exit 1 if its measured rows are stale")
    parser.add_argument("--record", metavar="NAME", help="with --check_readme: this row was measured again")
    return command("card.py", card, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
