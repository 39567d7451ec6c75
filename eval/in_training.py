"""Measure what the model answers while a run trains: perplexity, usability, stop rate, JSON validity on fixed rows.

    accelerate launch recipes/qwen3_qlora.py --hooks eval/in_training.py

With each evaluation (or after each `every` steps), `rows` rows drawn by the run's seed from its validation split are
measured as compare.py measures them afterwards, under the serving template, and logged as eval_assistant_perplexity,
eval_stop_rate and so on to log.jsonl, trackio and W&B, with the share of wall time that this takes;
--metric_for_best_model knows these names too. Losses come from TRL's fused head, which keeps no logits. Answers are
greedy; rows whose own answer is longer than `max_new_tokens` get none, since no model could stop in time. The run
trains the same weights with this hook as without, to the bit (tests/eval/test_in_training.py).

On several processes with whole weights (DDP, ZeRO-1, ZeRO-2) each measures its part of the rows. With sharded weights
(ZeRO-3, FSDP) every token of an answer would gather the whole model once: there it is the perplexity only. Sequence,
context and tensor parallelism are refused.

Accuracy by the letter, as nanochat watches MMLU and ARC-Easy each 200 steps: `letters` names files of their test rows;
the letter with the highest logit where the answer begins is the answer. eval_mmlu is the share that is right.

Other settings are a file of your own, passed to --hooks in place of this one:

    import sys
    sys.path.insert(0, ".")  # the repository
    from eval.in_training import InTraining

    class Mine(InTraining):
        rows = 64
        letters = {"mmlu": "data/mmlu-test", "arc_easy": "data/arc-easy-test"}

Of such a file the classes that it defines are used, not those that it imports: Mine alone. Without a recipe,
`trainer.add_callback(Mine(trainer))` does the same for TRL's SFTTrainer; it keeps no rows of messages, so that Mine
names a file of them as `data`.
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a recipe loads this file from anywhere
from data_prep.common.arrow_rows import batch_to_rows
from data_prep.common.errors import UsageError
from eval.common.letters import count_right_letters
from eval.common.measure import PreparedRow, clean_row, measure, prepare, read_rows
from eval.common.metrics import summarize
from eval.common.models import batches, pad
from eval.common.problems import TASKS, LetterProblem, letter_problem, read_problems

PASS_TOKENS = 4096  # padded tokens of a forward pass for the losses


class InTraining(TrainerCallback):
    """Log the figures of a few validation rows while a run trains."""

    every: int = 0  # optimizer steps; 0: with each evaluation
    rows: int = 32  # of the validation split
    data: str | None = None  # a file or dataset folder of messages rows instead of the run's own validation split
    split: str = "validation"  # of such a folder
    max_new_tokens: int = 128  # of each answer
    batch_size: int = 8  # rows at a time
    letters: ClassVar[dict[str, str]] = {}  # files or dataset folders of questions with choices, by a name of TASKS
    letter_split: str = "test"  # of such a folder
    letter_rows: int = 256  # of each
    metrics: tuple[str, ...] = ("assistant_perplexity", "usability", "stop_rate", "loop_rate", "json_valid")

    def __init__(self, trainer: Trainer) -> None:
        """Draw the rows.

        Raises:
            ValueError: nothing evaluates, there are no rows of messages, or a row is split over processes.
        """
        if trainer.args.eval_strategy == "no" and not self.every:
            raise ValueError(
                "in_training.py measures with evaluations: --eval_strategy steps --eval_steps 20, or epoch"
            )
        refuse_split_rows(trainer)
        self.trainer = trainer
        self.sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        self.seconds = 0.0  # spent on measuring
        self.measured_step: int | None = None
        self.figures: dict[str, float] = {}  # of that step
        self.prepared: list[PreparedRow] = []  # of the rows, those of which something is scored
        try:
            self.drawn_rows = draw_rows(self.validation_rows(), self.rows, trainer.args.seed)
            self.letter_problems = self.read_letters()
        except UsageError as error:
            raise ValueError(str(error)) from None

    def read_letters(self) -> dict[str, list[LetterProblem]]:
        """Return the questions of each task of `letters`. Raises UsageError."""
        known = [name for name, task in TASKS.items() if task.read is letter_problem]
        problems = {}
        for task, path in self.letters.items():
            if task not in known:
                raise UsageError(f"in_training.py: letters names {task}: it may name {', '.join(known)}")
            problems[task] = read_problems(task, path, self.letter_split, self.letter_rows, self.trainer.args.seed)
        return problems

    def validation_rows(self) -> Sequence[dict]:
        """Return the rows of messages to draw from. Raises UsageError."""
        if self.data:
            return read_rows(Path(self.data), self.split)
        if not hasattr(self.trainer, "validation_rows"):
            raise UsageError(
                f"in_training.py: {type(self.trainer).__name__} keeps no rows of messages, which the trainer of a "
                "recipe beside recipes/hooks does: set data of InTraining to a file of such rows"
            )
        rows = self.trainer.validation_rows
        if isinstance(rows, Dataset) and "messages" in rows.column_names:
            return rows
        raise UsageError(
            "in_training.py needs validation rows of messages, which this run does not have: --dataset_test_split or "
            "--eval_rows gives it some, or set data of InTraining to a file of such rows"
        )

    def say(self, text: str) -> None:
        """Print a line once a run."""
        if self.trainer.is_world_process_zero():
            print(f"in_training.py: {text}", flush=True)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Render the rows now: the tokenizer has its serving template."""
        self.began = time.perf_counter()
        tokenizer = self.trainer.processing_class
        self.stops = stop_tokens(tokenizer.eos_token_id, self.trainer.model)
        limit = args.max_length or self.trainer.model.config.get_text_config().max_position_embeddings
        skipped = []

        def skip(reason: str, place: str) -> None:
            skipped.append(reason)

        self.prepared = []
        for row in self.drawn_rows:
            prepared = prepare(row, tokenizer, self.stops, limit, skip)
            if prepared is not None and prepared.spans:
                self.prepared.append(prepared)
        for prepared in self.prepared:
            last = prepared.spans[-1]
            if self.sharded or last.end - last.start > self.max_new_tokens:
                prepared.asked = None
        self.say(self.describe_rows(skipped))

    def describe_rows(self, skipped: list[str]) -> str:
        """Return how many rows are measured. skipped: why turns are not scored."""
        answers = len([row for row in self.prepared if row.asked])
        text = f"perplexity of {len(self.prepared)} rows, answers to {answers}"
        if answers < len(self.prepared) and self.sharded:
            text += " (the weights are sharded)"
        elif answers < len(self.prepared):
            text += f" (the others need more than {self.max_new_tokens} tokens)"
        if skipped:
            text += f"; {len(skipped)} turns are not scored (first: {skipped[0]})"
        return text

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Measure with an evaluation of the run, and hand the figures on to the trainer."""
        if self.every or not self.trainer.is_in_train:
            return
        figures = self.measure_step()
        if metrics is not None:
            metrics.update(figures)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure every so many steps."""
        if self.every and state.global_step % self.every == 0:
            due = control.should_log
            self.measure_step()
            control.should_log = due  # what is logged clears it, and the step's own loss would not be logged

    def measure_step(self) -> dict[str, float]:
        """Return {eval_METRIC: value}, {} where it failed; logged once a step even where several sets are evaluated."""
        trainer = self.trainer
        step = trainer.state.global_step
        if self.measured_step == step:
            return self.figures
        began = time.perf_counter()
        with unchanged(trainer.model):
            try:
                records = self.measure_rows()
                accuracies = self.measure_letters()
            except UsageError as error:
                self.say(f"not measured: {error}")
                return {}
            summary = summarize(records, trainer.args.seed)
            self.figures = {f"eval_{name}": summary[name]["value"] for name in self.metrics if name in summary}
            self.figures |= accuracies
            self.measured_step = step
            now = time.perf_counter()
            self.seconds += now - began
            share = round(self.seconds / (now - self.began), 4)
            # still in evaluation mode: in training mode TRL would log, and forget, its means of the training steps
            trainer.log({**self.figures, "eval_answers_time_share": share})
        return self.figures

    def choose_parts(self) -> tuple[int, PreTrainedModel]:
        """Return over how many processes the work is divided, and the model.

        Sharded: each pass gathers the weights, so that all processes must make the same passes.
        """
        if self.sharded:
            return 1, self.trainer.model_wrapped
        return self.trainer.args.world_size, self.trainer.model

    def measure_letters(self) -> dict[str, float]:
        """Return {eval_TASK: share of right letters}, on every process. Raises UsageError on all."""
        parts, model = self.choose_parts()
        figures = {}
        for task, problems in self.letter_problems.items():
            own_problems = problems[self.trainer.args.process_index % parts :: parts]
            right = 0
            failure = ""
            try:
                right = count_right_letters(
                    model, self.trainer.processing_class, self.stops, own_problems, self.batch_size
                )
            except UsageError as error:
                failure = str(error)
            gathered = gather_object([(right, failure)])[:parts]
            for _, reason in gathered:
                if reason:
                    raise UsageError(reason)
            figures[f"eval_{task}"] = sum([count for count, _ in gathered]) / len(problems)
        return figures

    def measure_rows(self) -> list[dict]:
        """Return a record a row, on every process. Raises UsageError on all where one of them could not measure."""
        args = self.trainer.args
        parts, model = self.choose_parts()
        own_rows = self.prepared[args.process_index % parts :: parts]
        tokenizer = self.trainer.processing_class
        records: list[dict] = []
        failure = ""
        try:
            records = measure(
                model,
                own_rows,
                tokenizer,
                self.stops,
                self.batch_size,
                self.max_new_tokens,
                losses=fused_losses,
                languages="language_retention" in self.metrics,  # whose models take memory
            )
        except UsageError as error:
            failure = str(error)

        gathered = gather_object([(records, failure)])[:parts]
        for _, reason in gathered:
            if reason:
                raise UsageError(reason)
        whole = []
        for number in range(len(self.prepared)):
            part, _ = gathered[number % parts]
            whole.append(part[number // parts])
        return whole

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say what measuring took."""
        share = self.seconds / (time.perf_counter() - self.began)
        self.say(f"measuring took {self.seconds:.1f} s, {share:.1%} of the run")


def refuse_split_rows(trainer: Trainer) -> None:
    """Raise ValueError where a row is split over processes."""
    sizes = {"sequence": trainer.get_sp_size(), "context": trainer.get_cp_size(), "tensor": trainer.get_tp_size()}
    for kind, size in sizes.items():
        if size > 1:
            raise ValueError(f"in_training.py does not measure under {kind} parallelism: run without it")


def draw_rows(rows: Sequence[dict], count: int, seed: int) -> list[dict]:
    """Return `count` rows by seed, in their order, as clean_row has them. Raises UsageError."""
    numbers: Sequence[int] = range(len(rows))
    if len(rows) > count:
        numbers = sorted(random.Random(seed).sample(numbers, count))
    if isinstance(rows, Dataset):
        chosen = arrow_rows(rows.select(numbers))
    else:
        chosen = [rows[number] for number in numbers]
    return [clean_row(row, number + 1) for row, number in zip(chosen, numbers, strict=True)]


def arrow_rows(rows: Dataset) -> list[dict]:
    """Return the rows of a Dataset without what Arrow fills in, numbers as they are."""
    table = rows.with_format("arrow")[:]
    return [row for batch in table.to_batches() for row in batch_to_rows(batch)]


def stop_tokens(eos_token_id: int, model: PreTrainedModel) -> set[int]:
    """Return the ids that end an answer: the tokenizer's and those of the generation config."""
    stops = {eos_token_id}
    of_config = getattr(model.generation_config, "eos_token_id", None)
    if isinstance(of_config, list):
        stops.update(of_config)
    else:
        stops.add(of_config)
    return stops - {None}


@torch.no_grad()
def fused_losses(
    model: PreTrainedModel, sequences: list[list[int]], batch_size: int, fill: int, label: str
) -> list[np.ndarray]:
    """Return models.token_losses by TRL's fused head: the same numbers, a few hundred tokens' logits at a time.

    A float64 array (length - 1) of nats a sequence. fill: the token for padding; label: of the progress bar.
    """
    losses: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    for group in batches(sequences, batch_size, label, PASS_TOKENS):
        ids, mask = pad([sequences[i] for i in group], fill, False, model.device)
        labels = ids.masked_fill(mask == 0, -100)
        log_probs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
        for row, i in enumerate(group):
            losses[i] = -log_probs[row, : len(sequences[i]) - 1].double().cpu().numpy()
    return losses


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """Run in evaluation mode; afterwards every module, generation config and random state is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    configs = [(module, vars(module).get("generation_config")) for module in model.modules()]
    devices = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices.append(torch.cuda.current_device())
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, config in configs:
                vars(module).pop("generation_config", None)
                if config is not None:
                    module.generation_config = config
