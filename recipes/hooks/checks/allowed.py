"""What `--allow NAME` lets a run do that a check would refuse."""

from collections.abc import Iterable
from dataclasses import fields

from peft import LoraConfig

from .. import resume_rules
from ..differences import CONTENTS
from ..messages import UsageError
from .suggestions import nearest_name

MAX_FAULTY_SHARE = 0.01  # of packs or rows; a fault in more of them is refused, as by data_prep/preview.py --max_cut
MIN_SHARE = 0.9  # of the decoder's weights with adapters on them, and of the frozen ones in 4 bits where asked for

ALLOWED = {
    "bf16_weights": "full fine-tuning of bf16 or fp16 weights without fp32 master weights",
    "masked_packs": f"more than {MAX_FAULTY_SHARE:.0%} of the packs are fully masked: they hold nothing to train",
    "lost_personas": "rows whose system message or custom_instructions the template leaves out of the text",
    "cut_answers": f"more than {MAX_FAULTY_SHARE:.0%} of the rows are truncated within what is trained",
    "empty_answers": "assistant turns without text or tool calls: the model learns to answer nothing",
    "qlora_fsdp2": "QLoRA on FSDP2: right on CPUs with --bnb_4bit_quant_storage bfloat16 --optim adamw_torch",
    "other_tokenizer": "a compiled set (python -m data_prep.compile) of another tokenizer, template or special tokens",
    "save_only_model": "resuming from weights alone, with a new optimizer and a schedule from its start",
    "low_coverage": f"adapters on less than {MIN_SHARE:.0%} of the decoder's weights",
    "unquantized_weights": f"--load_in_4bit with less than {MIN_SHARE:.0%} of the frozen weights in 4 bits",
    "pad_is_stop": "padding with the stop token, which can give empty answers once the model is served",
    "untrained_stop": "answers that end with no stop token: the model is not taught to stop",
    "too_large": "a run that needs more memory than its GPU has, by the prediction of python -m eval.fit",
    "unprobed_packing": "packing where no small copy of the model runs: documents in a pack may see each other",
}


def check_allowed_names(allow: list[str], *arguments: object) -> None:
    """Raise UsageError for a name that no check asks for; the sentence lists all.

    `arguments`: dataclasses with the run's settings, which a resume names where they differ.
    """
    for name in allow:
        if name in ALLOWED or name in CONTENTS or is_setting(name, arguments):
            continue
        known = "; ".join(f"{known_name} ({what})" for known_name, what in ALLOWED.items())
        raise UsageError(
            f"--allow {name}: no such name{nearest_name(name, ALLOWED)}: there are {known}; and what a resume names"
        )


def is_setting(name: str, arguments: Iterable[object]) -> bool:
    """Return whether a resume can ask for this name."""
    if name in ("max_steps", "mixed_precision") or name in {field.name for field in fields(LoraConfig)}:
        return True
    return name not in resume_rules.FREE and any(hasattr(argument, name) for argument in arguments)
