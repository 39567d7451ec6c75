"""The stop token: it must be one of the tokenizer's, and padding must not mean it. trained_ends.py: is it trained."""

import logging
from difflib import get_close_matches

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, SFTConfig

from data_prep.common.rendering import choose_pad_token

from ..messages import UsageError
from .allowed import ALLOWED

SPELLING_CUTOFF = 0.88  # of difflib: a letter is wrong; tokens of another family are farther away
STOP_WARNING = "The chat template does not include the assistant turn's end-of-turn token"  # how TRL's begins
TRL_LOGGER = "trl.trainer.sft_trainer"
SHOWN_TOKENS = 9


def name_tokenizer(script_args: ScriptArguments, model_args: ModelConfig) -> str:
    """Return the folder or hub id of the tokenizer: the model's, or what a recipe's own flag names instead."""
    return getattr(script_args, "tokenizer_name_or_path", None) or model_args.model_name_or_path


def load_tokenizer(name: str, training_args: SFTConfig, model_args: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer as it lies in its folder, or None: the run itself says why it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=model_args.model_revision if name == model_args.model_name_or_path else None,
            trust_remote_code=training_args.trust_remote_code,
        )
    except Exception:  # a tokenizer's own code may raise anything
        return None


def check_stop_token(tokenizer: PreTrainedTokenizerBase, training_args: SFTConfig, model_name: str) -> None:
    """Raise UsageError for an --eos_token that the tokenizer does not know, as that of another family."""
    stop_token = training_args.eos_token
    if stop_token is None or stop_token in tokenizer.get_vocab():
        return
    special_tokens = [token for token in tokenizer.get_added_vocab() if token]
    spelled_alike = get_close_matches(stop_token, special_tokens, n=1, cutoff=SPELLING_CUTOFF)
    message = f"--eos_token {stop_token}: the tokenizer of {model_name} has no such token:"
    if spelled_alike:
        raise UsageError(f"{message} pass --eos_token {spelled_alike[0]}")
    if tokenizer.eos_token is not None:
        raise UsageError(
            f"{message} pass --eos_token {tokenizer.eos_token}, its own, or the token that ends a turn in its template"
        )
    raise UsageError(f"{message} pass one of {', '.join(special_tokens[:SHOWN_TOKENS])}")


def check_pad_token(
    tokenizer: PreTrainedTokenizerBase, training_args: SFTConfig, model_name: str, allow: list[str]
) -> None:
    """Raise UsageError where padding would be the stop token; TRL takes that where the tokenizer has no padding.

    A model that is saved so may answer nothing once it is served (transformers#48016).
    """
    stop_token = training_args.eos_token or tokenizer.eos_token
    pad_token = training_args.pad_token or tokenizer.pad_token or stop_token
    if pad_token != stop_token:
        check_pad_token_exists(tokenizer, pad_token, model_name)
        return
    if "pad_is_stop" in allow:
        return
    state = f"the tokenizer of {model_name} pads with its stop token {stop_token}"
    if training_args.pad_token is None and tokenizer.pad_token is None:
        state = f"the tokenizer of {model_name} has no padding token, and TRL would take the stop token {stop_token}"
    candidate = choose_pad_token(tokenizer, training_args.eos_token)
    remedy = f"--pad_token {candidate}"
    if candidate is None:
        remedy = "pass a token that no text needs as --pad_token"
    raise UsageError(f"{state}: {remedy}, or --allow pad_is_stop ({ALLOWED['pad_is_stop']})")


def check_pad_token_exists(tokenizer: PreTrainedTokenizerBase, pad_token: str, model_name: str) -> None:
    if pad_token not in tokenizer.get_vocab():
        special_tokens = list(tokenizer.get_added_vocab())[:SHOWN_TOKENS]
        raise UsageError(
            f"--pad_token {pad_token}: the tokenizer of {model_name} has no such token: pass one of "
            f"{', '.join(special_tokens)}"
        )


# -- TRL's warning that the stop token is not trained -----------------------------------------------------------------
def is_no_stop_warning(record: logging.LogRecord) -> bool:
    return STOP_WARNING not in record.getMessage()


def silence_stop_warning(training_args: SFTConfig) -> None:
    """Silence TRL's warning about the stop token where check_trained_ends looks at the answers themselves.

    TRL renders user, assistant, user: it accuses a template that trains a final answer alone (Qwen3 hybrid), and for
    any other fault it only warns.
    """
    logger = logging.getLogger(TRL_LOGGER)
    logger.removeFilter(is_no_stop_warning)
    if training_args.assistant_only_loss:
        logger.addFilter(is_no_stop_warning)
