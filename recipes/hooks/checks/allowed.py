"""What `--allow NAME` lets a run do that a check would refuse."""

from ..messages import UsageError
from .suggestions import nearest_name

MAX_FAULTY_SHARE = 0.01  # of packs or rows; a fault in more of them is refused, as by data_prep/preview.py --max_cut

ALLOWED = {
    "bf16_weights": "full fine-tuning of bf16 or fp16 weights without fp32 master weights",
    "masked_packs": f"more than {MAX_FAULTY_SHARE:.0%} of the packs are fully masked: they hold nothing to train",
    "lost_personas": "rows whose system message or custom_instructions the template leaves out of the text",
    "cut_answers": f"more than {MAX_FAULTY_SHARE:.0%} of the rows are truncated within what is trained",
    "qlora_fsdp2": "QLoRA on FSDP2: right on CPUs with --bnb_4bit_quant_storage bfloat16 --optim adamw_torch",
    "other_tokenizer": "a compiled set (data_prep/compile.py) of another tokenizer, template or special tokens",
    "other_run": "resuming what another recipe, template, tokenizer or data began",
    "pad_is_stop": "padding with the stop token, which can give empty answers once the model is served",
}


def check_allowed_names(allow: list[str]) -> None:
    """Raise UsageError for a name that no check asks for; the sentence lists all."""
    for name in allow:
        if name not in ALLOWED:
            known = "; ".join(f"{known_name} ({what})" for known_name, what in ALLOWED.items())
            raise UsageError(f"--allow {name}: no such name{nearest_name(name, ALLOWED)}: there are {known}")
