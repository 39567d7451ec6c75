"""Show a run: a block of lines when it starts, then one progress bar on a terminal, else a line for each logged step.

Elsewhere than on a terminal, or with --disable_tqdm true, the lines go to stdout. Both replace transformers' own.
"""

import math
import sys
import time
from pathlib import Path

from tqdm import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from trl import ModelConfig, ScriptArguments

from .loss_name import PLAIN_LOSS, describe_validation_loss, name_loss
from .start_block import amount, describe_engine, note_engine, start_block
from .trainer import SFTTrainer

BAR_FORMAT = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
LARGEST_EXPONENT = 700  # math.exp overflows from 710 on


def duration(seconds: float) -> str:
    """Return seconds as m:ss, from an hour on as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


def describe_loss(logs: dict[str, float]) -> str:
    """Return the loss of a step, with its parts where a KL term is one of them."""
    text = f"loss {logs['loss']:.4g}"
    if "kl" in logs:
        text += f" (nll {logs['nll']:.4g}, kl {logs['kl']:.3g})"
    return text


def format_training_logs(logs: dict[str, float]) -> str:
    speed = amount(logs["tokens_per_second"])
    trained_speed = amount(logs["trained_tokens_per_second"])
    parts = [
        describe_loss(logs),
        f"lr {logs['learning_rate']:.2e}",
        f"{speed} tokens/s ({trained_speed} trained)",
        f"{logs['padding_share']:.1%} padding",
        f"{logs['memory_gib']:.1f} GiB",
    ]
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.1%}")
    return ", ".join(parts)


def format_validation_logs(logs: dict[str, float], loss_name: str) -> str:
    text = describe_validation_loss(logs["eval_loss"], loss_name)
    if loss_name == PLAIN_LOSS:
        perplexity = math.exp(min(logs["eval_loss"], LARGEST_EXPONENT))
        text += f" (perplexity {perplexity:.4g})"
    if "eval_runtime" in logs:
        text += f" in {logs['eval_runtime']:.1f} s"
    return text


def format_logs(logs: dict[str, float], loss_name: str) -> str:
    """Return what was logged in words; names that are unknown here are shown as they are.

    `loss_name`: name_loss of the trainer.
    """
    if "tokens_per_second" in logs:
        return format_training_logs(logs)
    if "eval_loss" in logs:
        return format_validation_logs(logs, loss_name)
    parts = []
    for name, value in logs.items():
        if isinstance(value, float):
            parts.append(f"{name} {value:.4g}")
        else:
            parts.append(f"{name} {value}")
    return ", ".join(parts)


class Progress(ProgressCallback):
    """Show a run in place of transformers' progress callbacks; its throughput is prepared and read on every rank."""

    def __init__(self, trainer: SFTTrainer, script_args: ScriptArguments, model_args: ModelConfig) -> None:
        super().__init__()
        self.trainer = trainer
        self.script_args = script_args
        self.model_args = model_args
        self.first_step = 0
        self.began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        throughput = self.trainer.throughput
        throughput.prepare(state)
        self.first_step = state.global_step
        self.current_step = state.global_step  # ProgressCallback's, for the bar
        self.began = time.perf_counter()
        if not state.is_world_process_zero:
            return
        block = start_block(self.trainer, state, throughput.size, self.script_args, self.model_args)
        print(*block, sep="\n", flush=True)
        note_engine(Path(args.output_dir, "engine.txt"), describe_engine(self.trainer), state.global_step)
        if sys.stderr.isatty() and not args.disable_tqdm:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                smoothing=0,
                dynamic_ncols=True,
                bar_format=BAR_FORMAT,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.trainer.throughput.end_step()
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        text = format_logs(logs, name_loss(self.trainer))
        is_training_step = "tokens_per_second" in logs
        if self.training_bar is not None and is_training_step:
            self.training_bar.set_postfix_str(text)
        elif self.training_bar is not None:
            self.training_bar.write(f"{state.global_step}/{state.max_steps}  {text}")
        elif is_training_step:
            print(f"{state.global_step}/{state.max_steps}  {text}, {self.time_left(state)} left", flush=True)
        else:
            print(f"{state.global_step}/{state.max_steps}  {text}", flush=True)

    def time_left(self, state: TrainerState) -> str:
        """Return how long the rest takes at this process's mean pace, evaluations and saves included."""
        steps = max(state.global_step - self.first_step, 1)
        seconds_per_step = (time.perf_counter() - self.began) / steps
        return duration(seconds_per_step * (state.max_steps - state.global_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
