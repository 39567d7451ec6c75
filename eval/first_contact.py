"""Measure the recipes on a GPU that they have not seen, in its first minutes: no hub, random weights at true shapes.

    python -m eval.first_contact --out first_contact
    python -m eval.first_contact --out first_contact --minutes 30 --only qwen3_qlora "packed rows: sdpa"
    python -m eval.first_contact --out contact_tiny --tiny      # tiny shapes, on a CPU

Parts, in this order: the card and what eval.fit predicts for it; packed rows against each row alone, forward and
backward, for each attention; the README's three recipes; a run that is killed and resumed against one that was not, bit
for bit; each attention, Liger off, longer packs, 8B in 4 bits; a run with --full_determinism, killed and resumed too.
What does not fit by its prediction is left out. A run is the recipe's own script with its hooks, on rows of random
digits of about 512 tokens; its figures are those of its log.jsonl, the most memory that torch allocated and medians of
the steps after the first two.

Each part is a process of its own with a time limit (--part_minutes). One that fails is a row with its reason, and the
next one starts; what begins after --minutes is left out. Ctrl-C ends the part that runs and keeps what is done. OUT
gets first_contact.json (figures, card, driver, versions), first_contact.md (the tables that are printed, the README's
rows first) and a log for each part. Both files are written after every part.

Disk: 8 GB for the weights of 4B, 16 for those of 8B, 16 more while qwen3_full saves; all of it is deleted at the end.
Exit 0: every part that was begun is done. 1: one failed, packed rows are not as alone, or a resumed run has other
bits. 2: bad input.
"""

import argparse
import datetime
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.common.errors import UsageError
from data_prep.common.run_folder import read_entries
from eval.common.contact_plan import (
    FULL,
    REPO,
    STEPS,
    TINY_STEPS,
    Part,
    Predicted,
    Result,
    Run,
    Survey,
    launch_flags,
    list_parts,
    list_runs,
    model_folder,
    recipe_path,
)
from eval.common.contact_tables import describe_result, largest_difference, make_markdown
from eval.common.scores import command, parser_of, write_files

SCHEMA = 1  # of first_contact.json
NAME = "first_contact"
WARM_STEPS = 2  # kernels are compiled and chosen in them
POLL = 0.05  # seconds
REASON = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b|^\w+\.py: ")
RESERVED = re.compile(r"GiB at most \(([\d.]+) reserved")  # what recipes/hooks print when a run ends


# -- processes --------------------------------------------------------------------------------------------------------
@dataclass
class Ending:
    """How a process ended. why: "" where its exit code is 0, or where it was killed on purpose."""

    why: str
    was_killed: bool = False


def log_path(out: Path, name: str) -> Path:
    return out / f"{file_name(name)}.log"


def file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name.replace("--", ""))


def child_environment(is_tiny: bool) -> dict[str, str]:
    """Return the environment of a process: no hub, and the first of the GPUs, none for tiny shapes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if is_tiny:
        visible = ""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": visible,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(REPO),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_process(
    words: list[str], log: Path, seconds: float, is_tiny: bool = False, is_over: Callable[[], bool] | None = None
) -> Ending:
    """Run a command with its output in a log. is_over: when to kill it on purpose.

    Its whole process group is killed at the time limit and at Ctrl-C, which is raised again.
    """
    with log.open("ab") as file:
        start_of_log = file.tell()
        process = subprocess.Popen(
            words,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=child_environment(is_tiny),
            start_new_session=True,
        )
    began = time.monotonic()
    try:
        while process.poll() is None:
            took = time.monotonic() - began
            if took > seconds:
                return Ending(f"not done within {seconds / 60:.2g} minutes (--part_minutes)")
            if is_over is not None and is_over():
                return Ending("", was_killed=True)
            show_progress(took, log)
            time.sleep(POLL)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        clear_progress()
    if process.returncode == 0:
        return Ending("")
    text = log.read_bytes()[start_of_log:].decode(errors="replace")
    return Ending(find_reason(text, process.returncode))


def find_reason(text: str, code: int) -> str:
    """Return why a process failed, by the last line of its output that says so."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if REASON.match(line)]
    last = said[-1] if said else "".join(lines[-1:])
    if code < 0:
        last = f"killed by signal {-code}; {last}"
    return (last or f"exit code {code}")[:300]


def show_progress(took: float, log: Path) -> None:
    """Show on a terminal how long a part runs and what it printed last."""
    if not sys.stderr.isatty():
        return
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 300))
        lines = file.read().decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else ""
    print(f"\r\033[K  {log.stem}  {took:.0f} s  {last[:80]}", end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# -- parts ------------------------------------------------------------------------------------------------------------
class PartFails(Exception):
    """A part could not be done; with the reason."""


@dataclass
class Contact:
    """All that was found so far, and how it is gone about."""

    out: Path
    is_tiny: bool
    minutes: float
    part_minutes: float
    survey: Survey | None = None
    results: list[Result] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the time limit of a process."""
        return 60 * self.part_minutes

    def call_child(self, task: str, name: str, *flags: str) -> dict:
        """Return what a process of contact_child.py found. Raises PartFails."""
        result = self.out / f"{file_name(name)}.json"
        words = [sys.executable, "-m", "eval.common.contact_child", task, "--out", str(self.out)]
        words += ["--result", str(result), *flags]
        if self.is_tiny:
            words.append("--tiny")
        result.unlink(missing_ok=True)
        ending = run_process(words, log_path(self.out, name), self.seconds, self.is_tiny)
        if ending.why:
            raise PartFails(ending.why)
        found = json.loads(result.read_text(encoding="utf-8"))
        result.unlink()
        return found

    def launch(
        self, run: Run, name: str, folder: Path, *more: str, is_over: Callable[[], bool] | None = None
    ) -> Ending:
        """Run a recipe's script. Raises PartFails."""
        words = [sys.executable, recipe_path(run), *launch_flags(run, self.out, folder), *more]
        ending = run_process(words, log_path(self.out, name), self.seconds, self.is_tiny, is_over)
        if ending.why:
            raise PartFails(ending.why)
        return ending

    def find_result(self, name: str) -> Result | None:
        for result in self.results:
            if result.name == name:
                return result
        return None


def do_part(contact: Contact, part: Part) -> dict:
    """Return the figures of a part. Raises PartFails."""
    if part.kind == "packed":
        return contact.call_child("packed", part.name, "--model", part.run.model, "--attention", part.attention)
    make_weights(contact, part.run)
    if part.kind == "run":
        return do_run(contact, part.run)
    return do_resume(contact, part)


def make_weights(contact: Contact, run: Run) -> None:
    """Write the weights of a run's model where they are not there yet. Raises PartFails."""
    folder = model_folder(contact.out, run.model)
    if (folder / "written").is_file():
        return
    billions = float((re.findall(r"([\d.]+)B$", run.model) or ["0"])[0])
    check_disk(contact.out, billions * 2.1e9)
    contact.call_child("weights", f"weights of {run.model}", "--model", run.model)
    (folder / "written").touch()


def check_disk(folder: Path, size: float) -> None:
    """Raise PartFails where so many bytes are not free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise PartFails(f"needs {size / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free: pass an --out with more room")


def run_folder(contact: Contact, name: str) -> Path:
    return contact.out / "runs" / file_name(name)


def do_run(contact: Contact, run: Run) -> dict:
    """Return the figures of a run. Raises PartFails."""
    folder = run_folder(contact, run.name)
    shutil.rmtree(folder, ignore_errors=True)
    if run.recipe == FULL.recipe:
        check_disk(contact.out, 4 * 4.2e9)
    contact.launch(run, run.name, folder)
    if run.recipe == FULL.recipe:
        for path in folder.glob("*.safetensors"):
            path.unlink()  # a run that is not resumed needs none
    text = log_path(contact.out, run.name).read_text(errors="replace")
    return read_figures(read_entries(folder), text)


def read_figures(entries: list[dict], text: str) -> dict:
    """Return the figures of a run by its log.jsonl and what it printed. Raises PartFails for a log without steps."""
    steps = [entry for entry in entries if "tokens_per_second" in entry]
    if not steps:
        raise PartFails("the run logged no step")
    warm = steps[WARM_STEPS:] or steps
    speeds = [entry["tokens_per_second"] for entry in warm]
    shares = [entry["mfu"] for entry in warm if "mfu" in entry]
    reserved = RESERVED.findall(text)
    tokens = steps[-1].get("num_tokens", 0)
    return {
        "steps": len(steps),
        "peak_gib": max(entry["memory_gib"] for entry in steps),
        "reserved_gib": float(reserved[-1]) if reserved else None,
        "tokens_per_second": statistics.median(speeds),
        "slowest_tokens_per_second": min(speeds),
        "mfu": statistics.median(shares) if shares else None,
        "trained_share": round(steps[-1]["trained_tokens"] / tokens, 3) if tokens else None,
        "losses": [entry["loss"] for entry in steps],
    }


def do_resume(contact: Contact, part: Part) -> dict:
    """Return whether a run that is killed with SIGKILL after a save, then resumed, ends like the one that was not.

    Raises PartFails.
    """
    whole = run_folder(contact, part.run.name)
    uninterrupted = contact.find_result(part.run.name)
    if uninterrupted is None or uninterrupted.state != "done":
        raise PartFails(f"{part.run.name} has not run to its end: nothing to compare with")
    folder = run_folder(contact, part.name)
    shutil.rmtree(folder, ignore_errors=True)
    halfway = (TINY_STEPS if contact.is_tiny else STEPS) // 2

    def is_beyond_save() -> bool:
        """Return whether the step after the save is logged."""
        if not (folder / f"checkpoint-{halfway}").is_dir():
            return False
        return any(entry.get("step", 0) > halfway for entry in read_entries(folder))

    ending = contact.launch(part.run, part.name, folder, is_over=is_beyond_save)
    if not ending.was_killed:
        raise PartFails("the run ended before it could be killed")
    contact.launch(part.run, part.name, folder, "--resume_from_checkpoint", "true")
    return compare_runs(whole, folder)


def compare_runs(whole: Path, resumed: Path) -> dict:
    """Return whether two run folders have the same weights, byte for byte, and the largest difference of their losses.

    Raises PartFails where one of them has no weights.
    """
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    if not names or names != sorted(path.name for path in resumed.glob("*.safetensors")):
        raise PartFails("no weights to compare, or not the same files")
    is_same = True
    for name in names:
        if (whole / name).read_bytes() != (resumed / name).read_bytes():
            is_same = False
    return {"is_same": is_same, "loss_difference": largest_difference(read_losses(whole), read_losses(resumed))}


def read_losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_entries(folder) if "loss" in entry]


def why_left_out(part: Part, survey: Survey) -> str:
    """Return why a part is not begun on this machine, "" where it is."""
    attention = part.attention or part.run.attention
    reason = survey.attentions.get(attention or "", "")
    if reason:
        return reason
    if "--use_liger_kernel" in part.run.flags and survey.versions["liger-kernel"] == "none":
        return "Liger is not installed: no run here has it"
    predicted = survey.predicted.get(part.run.name)
    if part.kind != "packed" and predicted is not None and not predicted.fits:
        return f"does not fit: {predicted.needed_gib:.1f} GiB needed as predicted, the card has {survey.gib:.1f}"
    return ""


def do_parts(contact: Contact, parts: list[Part]) -> None:
    """Do the parts one after the other, and write the files after each. Raises KeyboardInterrupt once all is kept."""
    ends = time.monotonic() + 60 * contact.minutes
    for number, part in enumerate(parts, start=1):
        result = Result(part.name, part.kind, "done", recipe=part.run.recipe)
        if part.kind != "packed":
            result.flags = list(part.run.flags)
            result.predicted = contact.survey.predicted.get(part.run.name)
        contact.results.append(result)
        result.why = why_left_out(part, contact.survey)
        if not result.why and time.monotonic() > ends:
            result.why = f"no time left of {contact.minutes:g} minutes (--minutes)"
        if result.why:
            result.state = "left out"
        else:
            run_part(contact, part, result)
        write_report(contact)
        print(f"[{number}/{len(parts)}] {describe_result(result)}", flush=True)
        if result.state == "interrupted":
            raise KeyboardInterrupt


def run_part(contact: Contact, part: Part, result: Result) -> None:
    """Do one part, and set what became of it."""
    began = time.monotonic()
    try:
        result.figures = do_part(contact, part)
    except PartFails as error:
        result.state = "failed"
        result.why = str(error)
    except KeyboardInterrupt:
        result.state = "interrupted"
        result.why = "by Ctrl-C or SIGTERM"
    result.seconds = round(time.monotonic() - began, 1)


def make_report(contact: Contact) -> dict:
    """Return what first_contact.json holds."""
    survey = contact.survey
    return {
        "schema": SCHEMA,
        "kind": "measured",
        "date": datetime.date.today().isoformat(),
        "is_tiny": contact.is_tiny,
        "card": {"name": survey.gpu, "gib": round(survey.gib, 1), "driver": survey.driver},
        "versions": survey.versions,
        "attention": survey.attention,
        "parts": [asdict(result) for result in contact.results],
    }


def to_strict(value: object) -> object:
    """Return a value as strict JSON has it: None where a number is infinite or none."""
    if isinstance(value, dict):
        return {name: to_strict(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_report(contact: Contact) -> None:
    report = make_report(contact)
    text = json.dumps(to_strict(report), indent=1, allow_nan=False) + "\n"
    write_files(contact.out, {f"{NAME}.json": text, f"{NAME}.md": make_markdown(report)})


# -- the command ------------------------------------------------------------------------------------------------------
def read_survey(contact: Contact) -> Survey:
    """Return the survey of this machine. Raises UsageError."""
    try:
        found = contact.call_child("survey", "survey")
    except PartFails as error:
        raise UsageError(f"the machine cannot be looked at: {error} ({log_path(contact.out, 'survey')})") from None
    predicted = {name: Predicted(**entry) for name, entry in found["predicted"].items()}
    survey = Survey(**{**found, "predicted": predicted})
    if survey.gpu is None and not contact.is_tiny:
        raise UsageError("no GPU here that torch sees: pass --tiny for tiny shapes on a CPU")
    return survey


def choose_parts(parts: list[Part], only: list[str] | None) -> list[Part]:
    """Return the parts whose names are in --only. Raises UsageError for a name that no part has."""
    if not only:
        return parts
    names = [part.name for part in parts]
    for name in only:
        if name not in names:
            raise UsageError(f"--only {name}: no such part, they are: {'; '.join(names)}")
    return [part for part in parts if part.name in only]


def is_good(results: list[Result]) -> bool:
    """Return whether nothing failed, packed rows are as alone, and what was resumed has the same bits."""
    for result in results:
        if result.state in ("failed", "interrupted"):
            return False
        if result.figures.get("is_same") is False:
            return False
    return True


def run_contact(args: argparse.Namespace) -> int:
    """Do all parts and print the tables. Raises UsageError."""
    out = args.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {args.out}: is in use: pass a folder that does not exist yet")
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a machine that is taken away: keep what is done
    contact = Contact(out, args.tiny, args.minutes, args.part_minutes)
    try:
        print(f"looking at the machine, {out} gets the logs", flush=True)
        contact.survey = read_survey(contact)
        parts = choose_parts(list_parts(list_runs(args.tiny), contact.survey), args.only)
        do_parts(contact, parts)
    finally:
        shutil.rmtree(out / "models", ignore_errors=True)
        shutil.rmtree(out / "runs", ignore_errors=True)
        if contact.results:
            print((out / f"{NAME}.md").read_text(encoding="utf-8"), flush=True)
    print(f"{args.out / NAME}.json and {NAME}.md; python -m eval.fit --table has the predictions of other cards")
    return 0 if is_good(contact.results) else 1


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables, JSON and logs")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU: shows that all of it runs")
    parser.add_argument("--minutes", type=float, default=20, help="parts that would begin later are left out")
    parser.add_argument("--part_minutes", type=float, default=4, help="time limit of one process")
    parser.add_argument("--only", nargs="+", help="names of parts")
    args = parser.parse_args(argv)
    return command("first_contact.py", run_contact, args)


if __name__ == "__main__":
    sys.exit(main())
