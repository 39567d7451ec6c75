"""Merge a LoRA adapter into its base, and prove that the merged and the served model answer as the adapter does.

    python -m eval.merge runs/qwen3_qlora --out models/mine
    python -m eval.merge runs/qwen3_qlora --out models/mine --into dequantized --data data/chats --split validation

Merges W + scaling B A in float32 and casts once, to the type that the base's file has. W is the base's own weight
(--into original) or, for an adapter trained on a 4-bit base, what 4 bits left of it (--into dequantized): the weights
that the adapter was trained beside, rounded only by the cast. Follows PEFT: rank and alpha patterns, rsLoRA, DoRA of
linear layers, embeddings, fan_in_fan_out, modules_to_save; tied embeddings that the adapter sets apart are untied.
What it does not follow is refused by name (experts in 3-D parameters, trained tokens, biases, PiSSA and its like).

Memory: a shard is copied as a file and its changed weights are overwritten in place, one at a time, so that merging
takes the interpreter and about six times the largest changed weight in float32, whatever the size of the model or of
its shards (tested to stay within two shards). The proof loads the models whole, one after the other.

The proof asks --prompts questions (the prompts of --data's last answers, else neutral ones), greedily, of
    adapter   on its base as it was trained: in 4 bits where the run's config.yaml or --load_in_4bit says so
    merged    loaded anew from the folder
    served    the folder behind the chat endpoint of --engine
and compares
    logits         merged - adapter, at the position of every token of the adapter's own answers, its stop included:
                   largest and mean absolute difference over the vocabulary
    top-1          positions where both have the same most likely token
    same stop      the adapter's answers that end by themselves, where merged would end with the same token there
    same text      answers that merged generates as the adapter does, token by token; where top1: of those with the same
                   most likely token at every position, which differ by the settings of generation alone
    served         prompts of the same length in tokens, the same text, and an end for the same reason, against merged;
                   where the texts are the same and the server tells them (vLLM, llama.cpp), the largest difference of
                   the log-probabilities of their tokens
The proof ends with passed or failed. It fails where a difference is above --max_logit_diff, or where the 95% interval
of a share lies below --min_top1 (top-1, same stop, same text where top1, all of served). The share of all texts has no
bound: one other token makes another text. Defaults: adapters beside 4-bit weights differ from what --into original
makes of them, hence wider bounds; round_trip.py has them. Where texts differ, causes that are known from the weights
are named: 4 bits that were left behind, and copies of tied embeddings that are not tied any more.

Writes config, weights, generation_config (ends on the template's stop token and on what the base ends on, pads with
another), tokenizer with the serving template, and merge_report.json to --out, which must not exist: all in a hidden
folder beside it, renamed at the end. Exit 0 proven, 1 beyond a bound (the folder is there, the report says what), 2 bad
input. --prompts 0 proves nothing, --no_serve serves nothing; the report says so.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from data_prep.common.errors import UsageError
from data_prep.common.rendering import serving_template
from data_prep.common.terminal import STYLES, make_console
from eval.common.arguments import first_line, positive
from eval.common.lora_weights import (
    Adapter,
    Base,
    WeightMerger,
    Written,
    check_modules,
    read_adapter,
    read_base,
    write_weights,
)
from eval.common.models import adapter_base, add_adapter, check_vocabulary, load_model, load_tokenizer, render
from eval.common.round_trip import (
    Bounds,
    Check,
    Engine,
    Proof,
    ask_adapter,
    ask_merged,
    ask_served,
    check_proof,
    find_bounds,
    format_share,
    list_questions,
)
from eval.common.scores import PIPE_WIDTH, command, parser_of
from eval.endpoint import ENGINES, check_engine


# -- what is written beside the weights -------------------------------------------------------------------------------
def find_stop(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that the template ends an answer with: the first of the added ones after it.

    Raises UsageError where there is none.
    """
    messages = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": "unlikely words"}]
    text, _ = render(tokenizer, messages, generation_prompt=False)
    added = set(tokenizer.get_added_vocab().values())
    for token in tokenizer(text.rpartition("unlikely words")[2], add_special_tokens=False)["input_ids"]:
        if token in added:
            return token
    raise UsageError("the adapter's chat template ends an answer with no special token: train with one that does")


@dataclass
class Ends:
    """Ids of the tokens that end an answer, and of the one that pads."""

    stops: list[int]
    pad: int


def write_config(folder: Path, out: Path, untied: list[str]) -> None:
    """Write the base's config; where copies are untied it says so, for its text model too."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if untied:
        config["tie_word_embeddings"] = False
        for part in config.values():
            if isinstance(part, dict) and "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, out: Path) -> Ends:
    """Write the tokenizer with the serving form of its template, and the generation config of a base with its ends."""
    path = folder / "generation_config.json"
    generation = {}
    if path.is_file():
        generation = json.loads(path.read_text(encoding="utf-8"))
    stops = {find_stop(tokenizer), tokenizer.eos_token_id} - {None}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stops:
        tokenizer.pad_token = choose_pad(tokenizer, stops)
    pad = tokenizer.pad_token_id
    theirs = generation.get("eos_token_id")
    if isinstance(theirs, list):
        stops.update(theirs)
    else:
        stops.add(theirs)
    ends = Ends(sorted(stops - {None, pad}), pad)
    generation["eos_token_id"] = ends.stops
    if len(ends.stops) == 1:
        generation["eos_token_id"] = ends.stops[0]
    generation["pad_token_id"] = pad
    generation.pop("_from_model_config", None)
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    tokenizer.chat_template = serving_template(tokenizer.chat_template)
    tokenizer.save_pretrained(out)
    return ends


def choose_pad(tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> str:
    """Return an added token that ends nothing, by preference one named so: the recipes' own choice of padding may be
    the stop, with which answers come out empty."""
    names = set(tokenizer.convert_ids_to_tokens(sorted(stops)))
    return min(tokenizer.get_added_vocab(), key=lambda token: (token in names, "pad" not in token))


# -- the command ------------------------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("adapter", type=Path, help="run folder of a LoRA adapter, with its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged model; must not exist")
    parser.add_argument("--base", help="folder or hub id of the base (default: the one that the adapter names)")
    parser.add_argument("--into", choices=["original", "dequantized"], default="original", help="which base weights")
    parser.add_argument("--load_in_4bit", action="store_true", help="trained on nf4 (default: what config.yaml says)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the proof; auto: as trained (config.yaml), else the base's",
    )
    parser.add_argument("--prompts", type=int, default=50, help="how many to ask; 0: merge without proof")
    parser.add_argument("--data", type=Path, help="rows whose prompts are asked (default: neutral prompts)")
    parser.add_argument("--split", default="test", help="split of a dataset folder that has several")
    parser.add_argument("--max_new_tokens", type=positive, default=32, help="budget of each answer")
    parser.add_argument("--max_logit_diff", type=float, help="bound (default by dtype, 4 bits and --into)")
    parser.add_argument("--min_top1", type=float, help="bound (default by dtype, 4 bits and --into)")
    parser.add_argument("--no_serve", action="store_true", help="leave out the server")
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="what serves")
    parser.add_argument("--engine_python", default=sys.executable, help="the Python that has the engine (converter)")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py, for llamacpp")
    parser.add_argument("--llama_server", default="llama-server", help="llama.cpp's program, for llamacpp")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for what would only fail after minutes of merging."""
    if not (args.adapter / "adapter_config.json").is_file():
        raise UsageError(f"{args.adapter} is no adapter: pass a run folder with adapter_config.json")
    if args.out.exists():
        raise UsageError(f"{args.out} exists: pass another --out, or remove it")
    is_llama = args.engine == "llamacpp"
    has_converter = args.converter is not None and args.converter.is_file()
    if is_llama and not args.no_serve and not has_converter:
        raise UsageError("llamacpp serves GGUF files: pass --converter with llama.cpp's convert_hf_to_gguf.py")
    if args.prompts and not args.no_serve:
        check_engine(args.engine, args.llama_server if is_llama else args.engine_python)


@dataclass
class Training:
    """What a run's config.yaml says about the weights that its adapter was trained beside; dtype: None if nothing."""

    four_bit: bool
    dtype: str | None


def read_training(args: argparse.Namespace) -> Training:
    """Return what the run trained beside, --load_in_4bit included. Raises UsageError for another quantisation."""
    path = args.adapter / "config.yaml"
    config = {}
    if path.is_file():
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    four_bit = args.load_in_4bit or bool(config.get("load_in_4bit"))
    kind = config.get("bnb_4bit_quant_type", "nf4")
    is_nested = config.get("use_bnb_nested_quant", True)
    if four_bit and (kind != "nf4" or not is_nested):
        raise UsageError(f"{path} says {kind}, nested {is_nested}: only nf4 with nested quantisation is known here")
    if args.into == "dequantized" and not four_bit:
        raise UsageError(f"{args.adapter} was not trained in 4 bits, by its config.yaml: pass --load_in_4bit if it was")
    return Training(four_bit, config.get("dtype"))


@dataclass
class Result:
    """What a merge wrote and what its proof found; merged and served: figures, None where they were not measured."""

    written: Written
    ends: Ends
    merged: dict | None = None
    served: dict | None = None


def merge(args: argparse.Namespace) -> int:
    check_arguments(args)
    training = read_training(args)
    adapter = read_adapter(args.adapter)
    base = read_base(args.base or adapter_base(args.adapter), training.four_bit)
    tokenizer, stops = load_tokenizer(args.adapter)
    check_vocabulary(str(base.folder), tokenizer)
    check_modules(adapter, base)
    dtype = args.dtype
    if dtype == "auto":
        dtype = training.dtype or str(base.model.config.dtype or torch.float32).removeprefix("torch.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bounds = find_bounds(dtype, training.four_bit, args.into)
    if args.max_logit_diff is not None:
        bounds = Bounds(args.max_logit_diff, bounds.min_top1)
    if args.min_top1 is not None:
        bounds = Bounds(bounds.max_logit_diff, args.min_top1)
    context = getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    longest = context - args.max_new_tokens
    questions, refused = list_questions(args.data, args.split, args.prompts, tokenizer, longest)
    proof = Proof(questions, refused, dtype, device, args.max_new_tokens)
    merger = WeightMerger(adapter, base, args.into == "dequantized", getattr(torch, dtype), device)

    part = args.out.with_name(f".{args.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        part.mkdir(parents=True)
        result = write_and_prove(args, merger, tokenizer, stops, proof, training.four_bit, part)
        checks = check_proof(result.merged, result.served, bounds)
        report = make_report(args, base, training, proof, bounds, result, tokenizer)
        report["findings"] = [check.finding for check in checks if check.finding]
        report["causes"] = find_causes(args, adapter, base, training, result, report["findings"])
        report["checks"] = [list_check(check) for check in checks]
        report["verdict"] = "not run: --prompts 0"
        if checks:
            report["verdict"] = "failed" if report["findings"] else "passed"
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (part / "merge_report.json").write_text(text, encoding="utf-8")
        part.rename(args.out)
    except OSError as error:
        raise UsageError(f"cannot write to {args.out} ({first_line(error)}): make room or pass another --out") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    show(report, checks)
    for sentence in report["findings"]:
        print(f"FAILED {sentence}")
    for sentence in report["causes"]:
        print(f"cause: {sentence}")
    print(f"wrote {args.out}")
    print(describe_verdict(report, bounds))
    return int(report["verdict"] == "failed")


def write_and_prove(
    args: argparse.Namespace,
    merger: WeightMerger,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    proof: Proof,
    four_bit: bool,
    part: Path,
) -> Result:
    """Write the merged model to a folder and ask what the proof asks, one model in memory at a time."""
    with tempfile.TemporaryDirectory(dir=part) as folder:
        logits = Path(folder)
        if proof.questions:
            model = load_model(str(merger.base.folder), tokenizer, merger.dtype, proof.device, four_bit)
            model = add_adapter(model, args.adapter)
            outputs = ask_adapter(model, tokenizer, stops, proof, logits)
            del model
        written = write_weights(merger, part)
        write_config(merger.base.folder, part, written.untied)
        ends = write_tokenizer(merger.base.folder, tokenizer, part)
        result = Result(written, ends)
        if not proof.questions:
            return result
        merged = ask_merged(part, proof, outputs, stops, logits)
        result.merged = merged.figures
        if not args.no_serve:
            engine = Engine(args.engine, args.engine_python, args.converter, args.llama_server)
            result.served = ask_served(part, proof, merged, tokenizer, engine)
        return result


# -- the report -------------------------------------------------------------------------------------------------------
def make_report(
    args: argparse.Namespace,
    base: Base,
    training: Training,
    proof: Proof,
    bounds: Bounds,
    result: Result,
    tokenizer: PreTrainedTokenizerBase,
) -> dict:
    """Return what merge_report.json holds, without its verdict: names, not paths, so that it is the same wherever the
    folders lie."""
    base_name = base.name
    if Path(base.name).is_dir():
        base_name = base.folder.resolve().name
    not_served = "not run: --no_serve" if proof.questions else "not run: --prompts 0"
    return {
        "settings": {
            "adapter": args.adapter.resolve().name,
            "base": base_name,
            "data": args.data.resolve().name if args.data else "neutral prompts",
            "into": args.into,
            "load_in_4bit": training.four_bit,
            "dtype": proof.dtype,
            "device": proof.device,
            "max_new_tokens": proof.max_new_tokens,
            "max_logit_diff": bounds.max_logit_diff,
            "min_top1": bounds.min_top1,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "weights": asdict(result.written),
        "eos": tokenizer.convert_ids_to_tokens(result.ends.stops),
        "pad": tokenizer.convert_ids_to_tokens(result.ends.pad),
        "prompts": {"asked": len(proof.questions), "refused": proof.refused},
        "merged_against_adapter": result.merged or "not run: --prompts 0",
        "served_against_merged": result.served or not_served,
    }


def list_check(check: Check) -> dict:
    """Return a check as merge_report.json has it."""
    passed = not check.finding
    return {"comparison": check.comparison, "figure": check.figure, "bound": check.bound, "passed": passed}


def find_causes(
    args: argparse.Namespace, adapter: Adapter, base: Base, training: Training, result: Result, findings: list[str]
) -> list[str]:
    """Return what is known of the weights that makes answers differ, a sentence each; nothing where all are equal."""
    if result.merged is None:
        return []
    same_text = result.merged["same_text"]
    if not findings and same_text["count"] == same_text["total"]:
        return []
    causes = []
    for copy in result.written.untied:
        if copy in base.parted:
            causes.append(
                f"{base.name} says that it ties {copy}, and stores an untied copy of it with other values: what reads "
                "one of the two for both answers otherwise; save the base with tie_word_embeddings false, or as one"
            )
        else:
            causes.append(
                f"untied copies of tied embeddings: the base ties {copy} to {base.ties[copy]}, and the adapter was "
                "trained on copies that drifted apart, so the merged model holds both; train again without them, or "
                "with ensure_weight_tying"
            )
    if training.four_bit and args.into == "original":
        causes.append(
            "the adapter was trained beside 4-bit weights and stands beside the original ones now: "
            "--into dequantized keeps the weights of its training"
        )
    return causes


def describe_verdict(report: dict, bounds: Bounds) -> str:
    """Return the last line: passed or failed, the bounds, and how many figures lie within them."""
    checks = len(report["checks"])
    if not checks:
        return f"proof {report['verdict']}"
    limits = f"--max_logit_diff {bounds.max_logit_diff:g} and --min_top1 {bounds.min_top1:g} (a share by its interval)"
    kept = checks - len(report["findings"])
    line = f"proof {report['verdict']}: {kept} of {checks} figures within {limits}"
    if isinstance(report["served_against_merged"], str):
        line += f"; the server: {report['served_against_merged']}"
    return line


def show(report: dict, checks: list[Check]) -> None:
    """Print the table of a report, each figure with its bound and verdict."""
    settings = report["settings"]
    title = f"{settings['adapter']} into {settings['base']}"
    table = Table("comparison", "figure", "value (95%)", "n", "bound", "verdict", title=title)
    for key in ("merged_against_adapter", "served_against_merged"):
        figures = report[key]
        name = key.replace("_", " ")
        if isinstance(figures, str):
            table.add_row(name, figures, "", "", "", "", end_section=True)
            continue
        for label, value in figures.items():
            cells = format_figure(value)
            bound = "–"
            verdict = Text("–")
            for check in checks:
                if check.comparison == key.partition("_")[0] and check.figure == label:
                    word = "failed" if check.finding else "passed"
                    bound = check.bound
                    verdict = Text(word, style=STYLES[word])
            table.add_row(name, label.replace("_", " "), *cells, bound, verdict)
            name = ""
        table.add_section()
    make_console(PIPE_WIDTH).print(table)


def format_figure(value: object) -> list[str]:
    """Return the cells of a figure: its value with its interval, and its n."""
    if value is None:
        return ["–", "0"]
    if isinstance(value, dict):
        return [format_share(value), f"{value['total']:,}"]
    if isinstance(value, float):
        return [f"{value:.3g}", ""]
    return [str(value or 0), ""]


def main(argv: list[str] | None = None) -> int:
    return command("merge.py", merge, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
