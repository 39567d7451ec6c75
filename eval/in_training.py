"""Hook: while a run trains, what its model answers: perplexity, usability, stop rate, JSON validity on a fixed subset.

    accelerate launch recipes/qwen3_qlora.py --hooks eval/in_training.py

With each evaluation (or every EVERY steps), ROWS rows drawn by the run's seed from its validation split are measured as
compare.py measures them afterwards, under the serving template, and logged as eval_assistant_perplexity, eval_stop_rate
and so on to log.jsonl, trackio and W&B, with the share of wall time that this takes; --metric_for_best_model and
early_stopping.py know these names too. Losses come from TRL's fused head, which keeps no logits. Answers are greedy;
rows whose own answer is longer than MAX_NEW_TOKENS get none, since no model could stop in time. The run trains the same
weights with this hook as without, to the bit (tests/test_in_training.py).

On several processes with whole weights (DDP, ZeRO-1, ZeRO-2) each measures its part of the rows. With sharded weights
(ZeRO-3, FSDP) every token of an answer would gather the whole model once: there it is the perplexity only. Sequence,
context and tensor parallelism are refused.

Other settings: edit those below, or write a hook of your own with two lines or more and pass that:

    import sys; sys.path.insert(0, "eval"); import in_training; from in_training import callback, prepare
    in_training.ROWS = 64
"""

import random
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measure import clean_row, measure, read_rows, without_fill  # noqa: E402
from measure import prepare as prepare_row  # noqa: E402
from metrics import summarize  # noqa: E402
from models import BadInput, batches, pad  # noqa: E402

EVERY = 0  # optimizer steps; 0: with each evaluation
ROWS = 32  # of the validation split
DATA, SPLIT = None, "validation"  # a file or dataset folder of messages rows in place of the run's own split
MAX_NEW_TOKENS = 128  # of each answer
BATCH_SIZE = 8  # rows at a time
PASS_TOKENS = 4096  # padded tokens of a forward pass for the losses
METRICS = ("assistant_perplexity", "usability", "stop_rate", "loop_rate", "json_valid")  # of metrics.summarize
RUN = {}  # the rows that the recipe hands to the trainer


def prepare(script, args, model):
    """Keeps the validation rows as they are before TRL tokenises them. Raises ValueError where nothing evaluates."""
    if args.eval_strategy == "no" and not EVERY:
        raise ValueError("in_training.py measures with evaluations: --eval_strategy steps --eval_steps 20, or epoch")
    begin = SFTTrainer.__init__

    def keep(self, *rest, **named):
        SFTTrainer.__init__ = begin
        RUN["rows"] = named.get("eval_dataset")
        begin(self, *rest, **named)

    SFTTrainer.__init__ = keep


def raw_rows(seed):
    """The rows to measure, drawn by seed. Raises BadInput."""
    if DATA:
        rows = read_rows(Path(DATA), SPLIT)
    else:
        rows = RUN.get("rows")
        if not isinstance(rows, Dataset) or "messages" not in rows.column_names:
            raise BadInput(
                "in_training.py needs validation rows of messages, which this run does not have: --dataset_test_split "
                "or --eval_rows gives it some, or set DATA in eval/in_training.py to a file of such rows"
            )
    chosen = range(len(rows))
    if len(rows) > ROWS:
        chosen = sorted(random.Random(seed).sample(chosen, ROWS))
    features = getattr(rows, "features", None)
    return [clean_row(without_fill(rows[i], features) if features else rows[i], i + 1) for i in chosen]


@torch.no_grad()
def fused_losses(model, sequences, batch_size, fill, label):
    """models.token_losses by TRL's fused head: the same numbers, a few hundred tokens' logits at a time."""
    losses = [None] * len(sequences)
    for group in batches(sequences, batch_size, label, PASS_TOKENS):
        ids, mask = pad([sequences[i] for i in group], fill, False, model.device)
        labels = ids.masked_fill(mask == 0, -100)
        found = -model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
        for row, i in enumerate(group):
            losses[i] = found[row, : len(sequences[i]) - 1].double().cpu().numpy()
    return losses


@contextmanager
def unchanged(model):
    """Evaluation mode; afterwards every module, generation config and random state is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    configs = [(module, vars(module).get("generation_config")) for module in model.modules()]
    cuda = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(cuda):
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


class InTraining(TrainerCallback):
    def __init__(self, trainer):
        self.trainer, self.sharded = trainer, trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        self.seconds, self.step, self.found = 0.0, None, {}

    def say(self, text):
        if self.trainer.is_world_process_zero():
            print(f"in_training.py: {text}", flush=True)

    def on_train_begin(self, args, state, control, **_):
        """Prepares the rows now: the tokenizer has the serving template since the recipe's begin()."""
        self.began, skipped = time.perf_counter(), []
        tokenizer, model = self.trainer.processing_class, self.trainer.model
        eos = getattr(model.generation_config, "eos_token_id", None)
        self.stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        limit = args.max_length or model.config.get_text_config().max_position_embeddings
        rows = [
            row
            for row in self.rows
            if prepare_row(row, tokenizer, self.stops, limit, lambda reason, place: skipped.append(reason))
        ]
        self.rows = [row for row in rows if row["spans"]]
        for row in self.rows:
            start, end = row["spans"][-1][1:]
            if self.sharded or end - start > MAX_NEW_TOKENS:
                row["prompt"] = None
        answers = sum(row["prompt"] is not None for row in self.rows)
        reason = "the weights are sharded" if self.sharded else f"the others need more than {MAX_NEW_TOKENS} tokens"
        self.say(
            f"perplexity of {len(self.rows)} rows, answers to {answers}"
            + (f" ({reason})" if answers < len(self.rows) else "")
            + (f"; {len(skipped)} turns are not scored (first: {skipped[0]})" if skipped else "")
        )

    def on_evaluate(self, args, state, control, metrics=None, **_):
        if not EVERY and self.trainer.is_in_train:
            (metrics if metrics is not None else {}).update(self.measured())

    def on_step_end(self, args, state, control, **_):
        if EVERY and state.global_step % EVERY == 0:
            due = control.should_log
            self.measured()
            control.should_log = due  # what is logged clears it, and the step's own loss would not be logged

    def measured(self):
        """{eval_METRIC: value}, logged once a step even where several sets are evaluated; {} where it failed."""
        trainer, since = self.trainer, time.perf_counter()
        if self.step == trainer.state.global_step:
            return self.found
        with unchanged(trainer.model):
            records = self.records()
            if isinstance(records, str):
                self.say(f"not measured: {records}")
                return {}
            metrics = summarize(records, trainer.args.seed)
            self.found = {f"eval_{name}": metrics[name]["value"] for name in METRICS if name in metrics}
            self.step, now = trainer.state.global_step, time.perf_counter()
            self.seconds += now - since
            share = round(self.seconds / (now - self.began), 4)
            # still in evaluation mode: in training mode TRL would log, and forget, its means of the training steps
            trainer.log(self.found | {"eval_answers_time_share": share})
        return self.found

    def records(self):
        """A record of every row on every process; a sentence where one of them could not measure."""
        trainer, args = self.trainer, self.trainer.args
        # sharded: each pass gathers the weights, so that all processes must make the same passes
        parts = 1 if self.sharded else args.world_size
        model = trainer.model_wrapped if self.sharded else trainer.model
        mine, tokenizer = self.rows[args.process_index % parts :: parts], trainer.processing_class
        try:
            found = measure(model, mine, tokenizer, self.stops, BATCH_SIZE, MAX_NEW_TOKENS, losses=fused_losses)
        except BadInput as error:
            found = str(error)
        every = gather_object([found])[:parts]
        if told := next((part for part in every if isinstance(part, str)), None):
            return told
        return [every[i % parts][i // parts] for i in range(len(self.rows))]

    def on_train_end(self, args, state, control, **_):
        share = self.seconds / (time.perf_counter() - self.began)
        self.say(f"measuring took {self.seconds:.1f} s, {share:.1%} of the run")


def callback(trainer):
    sizes = {"sequence": trainer.get_sp_size(), "context": trainer.get_cp_size(), "tensor": trainer.get_tp_size()}
    if split := [kind for kind, size in sizes.items() if size > 1]:
        raise ValueError(f"in_training.py does not measure under {split[0]} parallelism: run without it")
    hook = InTraining(trainer)
    try:
        hook.rows = raw_rows(trainer.args.seed)
    except BadInput as error:
        raise ValueError(str(error)) from None  # the type that guard.py turns into a sentence
    return hook
