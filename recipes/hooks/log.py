"""Hook: log.jsonl in the run folder, one line per logged step, without gaps or doubles over a resume.

Each line is what the trainer logs ({"step", "epoch", "loss", "learning_rate", "grad_norm", "num_tokens", …} or the
"eval_" figures), numbers as numbers. eval/compare.py draws loss.png from it.
"""

import json
from pathlib import Path

from transformers import TrainerCallback


class Log(TrainerCallback):
    tokens_before = 0  # TRL counts num_tokens from 0 again after a resume

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            path = Path(args.output_dir, "log.jsonl")
            kept = path.read_text().splitlines() if path.is_file() and state.global_step else []
            kept = [line for line in kept if json.loads(line)["step"] <= state.global_step]
            path.write_text("".join(line + "\n" for line in kept))
            self.tokens_before = max((json.loads(line).get("num_tokens", 0) for line in kept), default=0)

    def on_log(self, args, state, control, logs, **_):
        if state.is_world_process_zero:
            counts = {name: logs[name] + self.tokens_before for name in logs if name.endswith("num_tokens")}
            with Path(args.output_dir, "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": state.global_step} | logs | counts) + "\n")


def callback(trainer):
    return Log()
