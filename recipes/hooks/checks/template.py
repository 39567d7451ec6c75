"""The chat template."""

from pathlib import Path
from typing import TYPE_CHECKING

from trl import SFTConfig

from data_prep.common import errors, rendering

from ..messages import UsageError

if TYPE_CHECKING:
    from ..trainer import SFTTrainer


def check_template(training_args: SFTConfig) -> None:
    """Raise UsageError unless --chat_template_path is a template, with markers where assistant_only_loss needs them."""
    name = training_args.chat_template_path
    if name is None:
        check_no_template_needed(training_args)
        return
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"--chat_template_path {name}: no such file; the templates are in chat_templates/")
    if path.suffix not in rendering.TEMPLATE_SUFFIXES:
        raise UsageError(
            f"--chat_template_path {name}: TRL takes a file for a template only where its name ends in .jinja or .j2: "
            "rename it"
        )
    text = path.read_text(encoding="utf-8")
    try:
        rendering.check_syntax(text, f"--chat_template_path {name}, line ")
    except errors.UsageError as error:
        raise UsageError(str(error)) from None
    if training_args.assistant_only_loss and not rendering.has_markers(text):
        raise UsageError(
            f"--chat_template_path {name}: no {{% generation %}} markers in it, which say what the assistant wrote: "
            "take a template of chat_templates/, or --assistant_only_loss false trains every token"
        )


def check_no_template_needed(training_args: SFTConfig) -> None:
    if training_args.assistant_only_loss:
        raise UsageError(
            "--chat_template_path: none is set, and --assistant_only_loss true needs one with {% generation %} "
            "markers: take a template of chat_templates/"
        )


def read_training_template(trainer: "SFTTrainer") -> str:
    """Return the template that the trainer rendered the rows with.

    The tokenizer's own has lost its markers by then: the recipe gives it the serving form.
    """
    path = trainer.args.chat_template_path
    if path is not None and Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    return trainer.chat_template or trainer.processing_class.chat_template
