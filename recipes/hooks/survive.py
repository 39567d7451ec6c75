"""Hook: a checkpoint is used only if it is whole, and only in the run that it belongs to.

Every save is sealed: once all ranks have written, `manifest.json` holds size and xxh3_128 of every file, and only then
is an older checkpoint deleted or the new one pushed. A resume reads them all again before anything is loaded; a folder
that fails is renamed `broken-checkpoint-40`, and the one before it is taken. `run.json` says which recipe, template,
tokenizer and training tokens the run has. All ranks must see the same output folder.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import transformers.trainer
import xxhash
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

MANIFEST, RUN = "manifest.json", "run.json"
SCRIPT = {}  # what prepare() was given
NAMES = {
    "recipe": "recipe",
    "template": "chat template",
    "tokenizer": "tokenizer",
    "data": "training tokens (rows, split, --max_length or packing)",
}


def say(text):
    print(f"{Path(sys.argv[0]).name}: {text}", flush=True)


def on_rank_0(work):
    """Returns work() as rank 0 found it, on every rank; what it raises there is raised everywhere, as a ValueError."""
    found = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = work()
        except Exception as error:
            if PartialState().num_processes == 1:
                raise
            found[1] = str(error)  # else the other ranks would wait for it
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    if found[1]:
        raise ValueError(found[1])
    return found[0]


# -- whole -------------------------------------------------------------------------------------------------------------
def digest(path, sync=False):
    """Returns [bytes, xxh3_128] of a file. sync: the file is on the disk first, else it is read from there again."""
    size, state = 0, xxhash.xxh3_128()
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        elif hasattr(os, "posix_fadvise"):  # not what the page cache still remembers of it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(1 << 24):
            size += len(block)
            state.update(block)
    return [size, state.hexdigest()]


def write(path, value):
    """Writes JSON aside and renames it: after a power cut the file is there whole, or not at all."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def sync_folder(path):
    with contextlib.suppress(OSError):  # some network file systems cannot
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def seal(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    sums = {str(path.relative_to(folder)): digest(path, sync=True) for path in files}
    for path in {path.parent for path in files}:
        sync_folder(path)
    write(folder / MANIFEST, {"files": sums})


def fault(folder):
    """Returns what is wrong with a sealed checkpoint, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, (size, checksum) in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes, {size:,} were written"
            if digest(folder / name)[1] != checksum:
                return f"{name} is not what was written (checksum)"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: its save was cut short"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def unsealed(folder):
    """True where a run without this hook wrote the checkpoint, and wrote it to its end."""
    state = folder / "trainer_state.json"
    ours = (folder.parent / RUN).is_file() or (folder / MANIFEST).is_file() or any(folder.parent.glob(f"*/{MANIFEST}"))
    return not ours and state.is_file() and state.read_bytes().endswith(b"\n}\n")


def accept(folder):
    """Returns None for a checkpoint that can be used, else what is wrong with it."""
    if unsealed(folder):
        say(f"{folder.name} was saved without checksums: taken unverified, checked from now on")
        seal(folder)
        return None
    return fault(folder)


def newest_whole(out):
    """Returns the newest checkpoint of a run folder that is whole, or None; moves the broken ones before it aside."""
    folders = [path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=lambda path: -int(path.name.split("-")[1])):
        wrong = accept(folder)
        if not wrong:
            return str(folder)
        aside = out / f"broken-{folder.name}"
        for number in range(2, 1000):
            if not aside.exists():
                break
            aside = out / f"broken-{folder.name}-{number}"
        folder.rename(aside)
        say(f"{folder.name} is broken, {wrong}: moved to {aside}")
    if folders:
        say(f"no checkpoint in {out} is whole: starts afresh")
    return None


def prepare(script, args, model):
    """Verifies the checkpoint to resume from, before anything is loaded, and takes the one before where it is broken.

    Raises ValueError (a sentence, by guard.py) for a broken checkpoint that was asked for by its path.
    """
    SCRIPT.update(script=script)
    chosen = str(script.resolved.get("resume_from_checkpoint")).lower()
    PartialState().wait_for_everyone()  # nobody still looks for a checkpoint while rank 0 moves one
    if chosen == "true":
        args.resume_from_checkpoint = on_rank_0(lambda: newest_whole(Path(args.output_dir)))
    elif args.resume_from_checkpoint:
        folder = Path(args.resume_from_checkpoint)
        if wrong := on_rank_0(lambda: accept(folder)):
            raise ValueError(
                f"checkpoint {folder} is broken, {wrong}: --resume_from_checkpoint true takes the newest whole one"
            )


# -- the same run ------------------------------------------------------------------------------------------------------
def tokens_hash(rows):
    """Returns a hash of what is trained, in its order: ids, labels and lengths of documents. 0.04 s for 10M tokens."""
    states = {name: (xxhash.xxh3_128(), xxhash.xxh3_128()) for name in ("input_ids", "labels", "seq_lengths")}
    states = {name: pair for name, pair in states.items() if name in rows.column_names}
    for table in rows.select_columns([*states]).with_format("arrow").iter(1000):
        for name, (values, lengths) in states.items():
            for chunk in table.column(name).chunks:
                values.update(chunk.flatten().to_numpy(zero_copy_only=False))
                lengths.update(chunk.value_lengths().to_numpy(zero_copy_only=False))
    return xxhash.xxh3_128(b"".join(state.digest() for pair in states.values() for state in pair)).hexdigest()


def provenance(trainer):
    tokenizer, template = trainer.processing_class, Path(str(trainer.args.chat_template_path))
    text = template.read_text() if template.is_file() else str(tokenizer.chat_template)
    words = json.dumps([tokenizer.special_tokens_map, sorted(tokenizer.get_vocab().items())], default=str)
    return {
        "recipe": Path(sys.argv[0]).name,
        "template": hashlib.sha256(text.encode()).hexdigest(),
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
        "data": tokens_hash(trainer.train_dataset),
    }


def same_run(trainer):
    """Writes run.json; raises ValueError where the checkpoint belongs to a run with another one."""
    now, chosen = provenance(trainer), trainer.args.resume_from_checkpoint
    path = Path(chosen).parent / RUN if chosen else None
    if path and path.is_file():
        before = json.loads(path.read_text())
        others = [NAMES[key] for key in NAMES if before.get(key) != now[key]]
        if others and "other_run" not in SCRIPT["script"].allow:
            recipe = f" ({before.get('recipe')}, not {now['recipe']})" if "recipe" in others else ""
            raise ValueError(
                f"{path.parent} belongs to a run with another {' and '.join(others)}{recipe}: another --output_dir "
                "starts afresh, --allow other_run goes on with it all the same"
            )
    write(Path(trainer.args.output_dir) / RUN, now)


# -- saved, then sealed, then pushed and the oldest deleted ------------------------------------------------------------
class Survive(TrainerCallback):
    """Does nothing: the work is around trainer._save_checkpoint, whose end no callback sees in time."""


def callback(trainer):
    on_rank_0(lambda: same_run(trainer))
    save, push = trainer._save_checkpoint, trainer._push_from_checkpoint
    rotate = transformers.trainer.rotate_checkpoints

    def save_and_seal(model, trial):
        later = []
        trainer._push_from_checkpoint = lambda folder: later.append(lambda: push(folder))
        transformers.trainer.rotate_checkpoints = lambda **limits: later.append(lambda: rotate(**limits))
        try:
            save(model, trial)
        finally:
            trainer._push_from_checkpoint, transformers.trainer.rotate_checkpoints = push, rotate
        folder = Path(trainer._get_output_dir(trial), f"checkpoint-{trainer.state.global_step}")
        trainer.accelerator.wait_for_everyone()  # every rank has written its files
        if trainer.is_world_process_zero():
            seal(folder)
            if trainer.control.should_training_stop and (wrong := fault(folder)):
                raise OSError(f"{folder} does not read back as it was written: {wrong}")
        for work in later:
            work()

    train = trainer._run_epoch

    def run_epoch(*args, **kwargs):
        if trainer.state.global_step >= trainer.state.max_steps:  # transformers 5.23 would train one step more
            trainer.control.should_training_stop = True
        else:
            train(*args, **kwargs)

    trainer._save_checkpoint, trainer._run_epoch = save_and_seal, run_epoch
    return Survive()
