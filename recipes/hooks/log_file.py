"""Keep log.jsonl in the run folder: a line for each logged step, without gaps or doubles over a resume.

Each line is what the trainer logs ({"step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", …} or the
"eval_" figures), numbers as numbers. data_prep/common/run_folder.py reads it.
"""

import json
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def lines_until(path: Path, last_step: int) -> list[str]:
    """Return the lines of a log up to a step, without one that a killed run left unfinished."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= last_step:
            lines.append(line)
    return lines


class LogFile(TrainerCallback):
    def __init__(self, trainer: Trainer) -> None:
        self.path = Path(trainer.args.output_dir, "log.jsonl")
        self.tokens_before = 0  # TRL counts num_tokens from 0 again after a resume

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not state.is_world_process_zero:
            return
        lines = []
        if state.global_step and self.path.is_file():
            lines = lines_until(self.path, state.global_step)
        self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        counts = [json.loads(line).get("num_tokens", 0) for line in lines]
        self.tokens_before = max(counts, default=0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero:
            return
        entry = {"step": state.global_step, **logs}
        for name in logs:
            if name.endswith("num_tokens"):
                entry[name] += self.tokens_before
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
