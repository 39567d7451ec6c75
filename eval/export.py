"""Export a model as quantised GGUF files for llama.cpp and Ollama, and measure what each type costs in answers.

    python -m eval.export models/mine --out exports/mine --llama_cpp llama.cpp --data data/chats --split validation
    python -m eval.export models/mine --out exports/mine --llama_cpp llama.cpp --types Q6_K Q5_K_M Q4_K_M

The model is a folder with its tokenizer, as merge.py or a full fine-tuning leaves it. --llama_cpp is llama.cpp's
folder: its convert_hf_to_gguf.py makes a GGUF file in the model's own type, build/bin/llama-quantize one of each of
--types from that, and build/bin/llama-server serves each for the round trip (eval/SERVING.md says how to build them).

The round trip asks --prompts questions (the prompts of --data's last answers, else neutral ones), greedily, of the
model in transformers and of each file, and compares
    same prompt    prompts of the same length in tokens: the template and the vocabulary came along
    same text      answers that are the model's own, and same end: those that end for the same reason
    same tokens    of the model's answers, tokens before the first other one
    log-prob diff  largest and mean difference of the log-probabilities of these tokens
    right          answers that meet the data's own (compare.py's exact match) before and after, and the paired change
The first is held to its bound: the export fails where its 95% interval lies below --min_same_prompt. The others are
what the type costs; --min_same_text makes a bound of that one too.

Writes NAME.TYPE.gguf and NAME.TYPE.Modelfile for each type, and export_report.json, to --out, which must not exist.
A Modelfile has no TEMPLATE: that is a Go template, which no Jinja template turns into by itself. From 0.30 on, Ollama
renders the Jinja template of the GGUF file, tokenizer.chat_template, which is read back here and held to the model's
own; the file requires that version. It makes an exception for a template that is a known one but for 100 letters, to
which it has a Go template of its own: none of chat_templates/ is. Ollama itself is not run here.

Exit 0: every bound is kept. 1: one is not (the files are there, the report says what). 2: bad input. --prompts 0
measures nothing, and the report says so.
"""

import argparse
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, PreTrainedTokenizerBase

from data_prep.common.answers import Answer, find_family, parse_answer
from data_prep.common.errors import UsageError
from data_prep.common.terminal import STYLES, make_console
from eval.common.arguments import first_line, positive
from eval.common.intervals import rate, rate_change
from eval.common.metrics import exact_match
from eval.common.models import Output, load_model, load_tokenizer
from eval.common.round_trip import (
    GGUF_TYPES,
    Answers,
    Engine,
    Proof,
    Question,
    ask_engine,
    ask_model,
    convert_to_gguf,
    describe_count,
    format_share,
    list_questions,
)
from eval.common.scores import PIPE_WIDTH, command, parser_of
from eval.endpoint import check_engine

TYPES = ["Q8_0", "Q4_K_M"]
OLLAMA = "0.30.0"  # the first that renders a GGUF file's own Jinja template
PARAMETERS = {  # of generation_config.json: their names in a Modelfile
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
GGUF_MAGIC = b"GGUF"
GGUF_KINDS = "BbHhIif?saQqd"  # of struct, in the order of the format's numbers
GGUF_STRING = 8
GGUF_ARRAY = 9


@dataclass
class Programs:
    """What of llama.cpp is run; python: has what its converter imports."""

    python: str
    converter: Path
    quantize: Path
    server: Path


def find_programs(folder: Path, python: str) -> Programs:
    """Return the programs of a llama.cpp folder. Raises UsageError where one is missing."""
    programs = Programs(
        python=python,
        converter=folder / "convert_hf_to_gguf.py",
        quantize=folder / "build" / "bin" / "llama-quantize",
        server=folder / "build" / "bin" / "llama-server",
    )
    for path in (programs.converter, programs.quantize, programs.server):
        if not path.is_file():
            raise UsageError(f"{path} does not exist: pass --llama_cpp with a built llama.cpp (eval/SERVING.md)")
    check_engine("llamacpp", str(programs.server))
    return programs


# -- a GGUF file ------------------------------------------------------------------------------------------------------
def quantize(programs: Programs, source: Path, target: Path, kind: str) -> None:
    """Write a GGUF file of another type. Raises UsageError."""
    done = subprocess.run([programs.quantize, source, target, kind], capture_output=True, text=True, errors="replace")
    if done.returncode or not target.is_file():
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise UsageError(f"llama-quantize makes no {kind} of {source.name} ({lines[-1]}): pass another of its --types")


def read_template(path: Path) -> str | None:
    """Return tokenizer.chat_template of a GGUF file, None where it has none. Raises UsageError."""
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise UsageError(f"{path} is no GGUF file: export again")
        _, _, count = struct.unpack("<IQQ", file.read(20))  # version, tensors, metadata
        for _ in range(count):
            key = read_string(file)
            value = read_value(file, struct.unpack("<I", file.read(4))[0])
            if key == "tokenizer.chat_template":
                return value
    return None


def read_string(file: BinaryIO) -> str:
    (size,) = struct.unpack("<Q", file.read(8))
    return file.read(size).decode("utf-8", errors="replace")


def read_value(file: BinaryIO, kind: int) -> object:
    """Return a value of a GGUF file's metadata, which stand there one after the other."""
    if kind == GGUF_STRING:
        return read_string(file)
    if kind == GGUF_ARRAY:
        item_kind, count = struct.unpack("<IQ", file.read(12))
        return [read_value(file, item_kind) for _ in range(count)]
    form = f"<{GGUF_KINDS[kind]}"
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def make_modelfile(gguf: str, folder: Path, stops: list[str]) -> str:
    """Return a Modelfile for a GGUF file beside it: where its answers end, and how the model's own config samples."""
    path = folder / "generation_config.json"
    generation = {}
    if path.is_file():
        generation = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"# The template is that of the GGUF file: Ollama {OLLAMA} and newer render its Jinja.",
        f"FROM ./{gguf}",
        f"REQUIRES {OLLAMA}",
    ]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    values = {"repeat_penalty": 1.0}  # Ollama 0.30's own default is 1.1
    for name, parameter in PARAMETERS.items():
        if generation.get(name) is not None:
            values[parameter] = generation[name]
    lines += [f"PARAMETER {parameter} {value:g}" for parameter, value in values.items()]
    return "\n".join(lines) + "\n"


# -- what it costs ----------------------------------------------------------------------------------------------------
@dataclass
class Comparison:
    """Parses answers of one family and holds them to those of the data."""

    tokenizer: PreTrainedTokenizerBase
    family: str

    def is_right(self, question: Question, answer: Answer) -> bool | None:
        """Return whether an answer meets the data's own, None of a question without one."""
        if question.reference is None:
            return None
        calls = question.reference.get("tool_calls") or []
        wanted = Answer(content=str(question.reference.get("content") or ""), tool_calls=calls)
        return exact_match(wanted, answer)

    def judge_outputs(self, proof: Proof, outputs: list[Output]) -> list[bool | None]:
        flags = []
        for question, output in zip(proof.questions, outputs, strict=True):
            text = self.tokenizer.decode(output.tokens, clean_up_tokenization_spaces=False)
            answer = parse_answer(text, self.family, question.text, question.tools)
            flags.append(self.is_right(question, answer))
        return flags

    def judge_choices(self, proof: Proof, choices: dict[str, dict]) -> list[bool | None]:
        """Return a flag for each question; one that the server failed on is wrong."""
        flags = []
        for question in proof.questions:
            message = choices.get(question.id, {}).get("message", {})
            content = message.get("content") or ""  # with thoughts and calls, as they were written
            answer = parse_answer(content, self.family, question.text, question.tools)
            flags.append(self.is_right(question, answer))
        return flags


def measure_file(
    gguf: Path, programs: Programs, proof: Proof, answers: Answers, comparison: Comparison, right: list[bool | None]
) -> dict:
    """Return the figures of a GGUF file's round trip. right: whether the model's own answers meet the data's."""
    totals = ask_engine("llamacpp", str(programs.server), gguf, proof, answers, comparison.tokenizer)
    figures = totals.figures("llamacpp")
    differences = []
    tokens = 0
    for question, output, log_probs in zip(proof.questions, answers.outputs, answers.log_probs, strict=True):
        tokens += len(output.tokens)
        choice = totals.choices.get(question.id, {})
        differences += compare_log_probs(choice, output.tokens, log_probs)
    if tokens:
        figures["same_tokens"] = {"value": len(differences) / tokens, "tokens": tokens}
    if differences:
        figures["max_logprob_diff"] = max(differences)
        figures["mean_logprob_diff"] = sum(differences) / len(differences)
    after = comparison.judge_choices(proof, totals.choices)
    figures["right"] = rate(after)
    if figures["right"]:
        before = [flag for flag in right if flag is not None]
        figures["right_change"] = rate_change([flag for flag in after if flag is not None], before)
    return figures


def compare_log_probs(choice: dict, tokens: list[int], log_probs: list[float]) -> list[float]:
    """Return the differences of the log-probabilities of the tokens before the first other one."""
    differences = []
    content = (choice.get("logprobs") or {}).get("content") or []
    for theirs, token, log_prob in zip(content, tokens, log_probs, strict=False):
        if theirs["id"] != token:
            break
        differences.append(abs(theirs["logprob"] - log_prob))
    return differences


def check_figures(kind: str, figures: dict, bounds: dict[str, float]) -> list[str]:
    """Return a sentence for each share whose interval lies below its bound."""
    findings = []
    for name, least in bounds.items():
        share = figures.get(name)
        if share and share["high"] < least:
            findings.append(f"{kind}: {name} in {describe_count(share)}, less than --min_{name} {least:g}")
    return findings


# -- the command ------------------------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("model", type=Path, help="folder of a whole model, with its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files; must not exist")
    parser.add_argument("--llama_cpp", type=Path, required=True, help="llama.cpp's folder, built")
    parser.add_argument("--engine_python", default=sys.executable, help="the Python of llama.cpp's converter")
    parser.add_argument("--types", nargs="+", default=TYPES, help="of llama-quantize (default: Q8_0 Q4_K_M)")
    parser.add_argument("--dtype", choices=["auto", *GGUF_TYPES], default="auto", help="auto: as the model is stored")
    parser.add_argument("--prompts", type=int, default=50, help="how many to ask; 0: export without a round trip")
    parser.add_argument("--data", type=Path, help="rows whose prompts are asked (default: neutral prompts)")
    parser.add_argument("--split", default="test", help="split of a dataset folder that has several")
    parser.add_argument("--max_new_tokens", type=positive, default=256, help="budget of each answer")
    parser.add_argument("--min_same_prompt", type=float, default=0.999, help="bound: the template came along")
    parser.add_argument("--min_same_text", type=float, default=0.0, help="bound of the answers (default: none)")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UsageError for a folder that is no whole model, and for one that is in the way."""
    if (args.model / "adapter_config.json").is_file():
        raise UsageError(f"{args.model} is an adapter: merge it first (python -m eval.merge)")
    if not (args.model / "config.json").is_file():
        raise UsageError(f"{args.model} is no model: pass a folder with config.json and the tokenizer")
    if args.out.exists():
        raise UsageError(f"{args.out} exists: pass another --out, or remove it")
    if len(set(args.types)) < len(args.types):
        raise UsageError("--types names a type twice: pass each once")


def export(args: argparse.Namespace) -> int:
    check_arguments(args)
    programs = find_programs(args.llama_cpp, args.engine_python)
    tokenizer, stops = load_tokenizer(args.model)
    proof = make_proof(args, tokenizer)
    exporter = Exporter(args, programs, tokenizer, stops, proof)
    part = args.out.with_name(f".{args.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        part.mkdir(parents=True)
        report = exporter.write_files(part)
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (part / "export_report.json").write_text(text, encoding="utf-8")
        part.rename(args.out)
    except OSError as error:
        raise UsageError(f"cannot write to {args.out} ({first_line(error)}): make room or pass another --out") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    show(report)
    for sentence in report["findings"]:
        print(f"FAILED {sentence}")
    print(f"wrote {args.out}")
    limits = f"--min_same_prompt {args.min_same_prompt:g} and --min_same_text {args.min_same_text:g}"
    print(f"export {report['verdict']}, by {limits} (a share by its interval)")
    return int(report["verdict"] == "failed")


def make_proof(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Proof:
    """Return what is asked of the model, and in which type. Raises UsageError."""
    config = AutoConfig.from_pretrained(args.model)
    dtype = args.dtype
    if dtype == "auto":
        dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    longest = context - args.max_new_tokens
    questions, refused = list_questions(args.data, args.split, args.prompts, tokenizer, longest)
    return Proof(questions, refused, dtype, device, args.max_new_tokens)


@dataclass
class Exporter:
    """Writes and measures the files of one model."""

    args: argparse.Namespace
    programs: Programs
    tokenizer: PreTrainedTokenizerBase
    stops: set[int]
    proof: Proof

    def write_files(self, part: Path) -> dict:
        """Write the files of each type to a folder; return the report on them."""
        comparison = Comparison(self.tokenizer, find_family(self.tokenizer.chat_template))
        report = self.start_report()
        answers = None
        right: list[bool | None] = []
        if self.proof.questions:
            answers = self.ask_own_model()
            right = comparison.judge_outputs(self.proof, answers.outputs)
            report["model"] = {"right": rate(right)}
        bounds = {"same_prompt": self.args.min_same_prompt, "same_text": self.args.min_same_text}
        for kind, path in self.make_types(part):
            figures = {"megabytes": path.stat().st_size / 1e6}
            if answers is not None:
                figures |= measure_file(path, self.programs, self.proof, answers, comparison, right)
            report["types"][kind] = figures
            report["findings"] += check_figures(kind, figures, bounds)
        if answers is not None:
            report["verdict"] = "failed" if report["findings"] else "passed"
        return report

    def start_report(self) -> dict:
        args = self.args
        return {
            "settings": {
                "model": args.model.resolve().name,
                "data": args.data.resolve().name if args.data else "neutral prompts",
                "dtype": self.proof.dtype,
                "max_new_tokens": args.max_new_tokens,
                "min_same_prompt": args.min_same_prompt,
                "min_same_text": args.min_same_text,
            },
            "versions": {"llama.cpp": read_version(self.programs.server), "transformers": version("transformers")},
            "prompts": {"asked": len(self.proof.questions), "refused": self.proof.refused},
            "types": {},
            "findings": [],
            "verdict": "not run: --prompts 0",
        }

    def ask_own_model(self) -> Answers:
        dtype = getattr(torch, self.proof.dtype)
        model = load_model(str(self.args.model), self.tokenizer, dtype, self.proof.device)
        return ask_model(model, self.tokenizer, self.stops, self.proof)

    def make_types(self, part: Path) -> Iterator[tuple[str, Path]]:
        """Yield each type and its GGUF file, with a Modelfile beside it; what they are made of goes at the end.

        Raises UsageError where a file does not hold the model's template.
        """
        folder = self.args.model
        engine = Engine("llamacpp", self.programs.python, self.programs.converter)
        source = convert_to_gguf(folder, engine, self.proof.dtype, part / "source.gguf")
        stop_tokens = self.tokenizer.convert_ids_to_tokens(sorted(self.stops))
        for kind in self.args.types:
            path = part / f"{folder.resolve().name}.{kind}.gguf"
            quantize(self.programs, source, path, kind)
            if read_template(path) != self.tokenizer.chat_template:
                raise UsageError(f"{path.name} does not hold the template of {folder}: look at llama.cpp's converter")
            modelfile = make_modelfile(path.name, folder, stop_tokens)
            path.with_suffix(".Modelfile").write_text(modelfile, encoding="utf-8")
            yield kind, path
        source.unlink()


def read_version(server: Path) -> str:
    """Return what llama-server says of its version, "" where it says nothing."""
    done = subprocess.run([server, "--version"], capture_output=True, text=True, errors="replace")
    for line in (done.stdout + done.stderr).splitlines():
        if line.startswith("version:"):
            return line.removeprefix("version:").strip()
    return ""


def show(report: dict) -> None:
    """Print the table of a report: a line a type, the model's own first."""
    columns = ["type", "MB", "same prompt", "same text", "same tokens", "log-prob diff (mean)", "right", "change", "n"]
    settings = report["settings"]
    table = Table(*columns, title=f"{settings['model']}, {settings['data']}")
    right = format_share(report.get("model", {}).get("right"))
    table.add_row("model", "–", "–", "–", "–", "–", right, "–", str(report["prompts"]["asked"]))
    for kind, figures in report["types"].items():
        has_failed = any(sentence.startswith(f"{kind}:") for sentence in report["findings"])
        label = Text(kind, style=STYLES["failed" if has_failed else "passed"])
        table.add_row(label, *format_figures(figures))
    make_console(PIPE_WIDTH).print(table)


def format_figures(figures: dict) -> list[str]:
    """Return the cells of a type, behind its name."""
    cells = [f"{figures['megabytes']:.1f}"]
    for name in ("same_prompt", "same_text"):
        cells.append(format_share(figures.get(name)))
    same_tokens = "–"
    if "same_tokens" in figures:
        same_tokens = "{value:.3f} of {tokens:,}".format(**figures["same_tokens"])
    difference = "–"
    if "max_logprob_diff" in figures:
        difference = "{max_logprob_diff:.2g} ({mean_logprob_diff:.2g})".format(**figures)
    change = "–"
    if "right_change" in figures:
        change = "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**figures["right_change"])
    cells += [same_tokens, difference, format_share(figures.get("right")), change]
    asked = figures.get("same_prompt") or {"total": 0}
    return [*cells, str(asked["total"])]


def main(argv: list[str] | None = None) -> int:
    return command("export.py", export, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
