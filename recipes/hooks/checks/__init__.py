"""Checks: what would waste a run without a word is refused before it is paid for, or counted in one line at its start.

A file a subject. Every refusal raises UsageError with one sentence; what a user may want all the same has a name in
allowed.py for `--allow NAME`.
"""

from typing import TYPE_CHECKING

from trl import ModelConfig, ScriptArguments, SFTConfig

from ..checkpoints import read_run
from .adapter_coverage import check_adapter_coverage, check_adapter_settings
from .allowed import ALLOWED, check_allowed_names
from .attention import choose_attention
from .checkpoint import check_engine_of_checkpoint, check_optimizer_state, check_output_dir, say_unknown_run
from .compiled import check_compiled_for
from .counts import check_counts
from .devices import check_visible_gpus
from .downloads import say_downloads
from .engine import (
    check_master_weights,
    check_method_and_engine,
    check_model_class,
    check_sequence_parallelism,
    load_config,
    name_engine,
)
from .fit import check_fits
from .packing import check_packing
from .paths import check_model_and_dataset_names
from .personas import check_personas
from .ranks import refuse_on_all_ranks
from .rows import check_local_rows, check_own_template_arguments, check_rows
from .settings import check_choices, check_packages, say_save_only_model
from .steps import say_few_steps
from .stop_token import check_pad_token, check_stop_token, load_tokenizer, name_tokenizer, silence_stop_warning
from .template import check_template
from .tied_embeddings import check_tied_embeddings
from .trained_ends import check_trained_ends

if TYPE_CHECKING:
    from ..trainer import SFTTrainer

__all__ = [
    "ALLOWED",
    "check_before_load",
    "check_before_train",
    "check_checkpoint",
    "check_output_dir",
    "check_rows",
    "name_engine",
    "refuse_on_all_ranks",
]


def check_before_load(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise UsageError for what can be known before model and data are loaded.

    `script_args` are a recipe's RecipeArguments, `training_args.model_init_kwargs` holds its attention.
    """
    allow = script_args.allow
    with refuse_on_all_ranks(training_args):
        check_allowed_names(allow, script_args, training_args, model_args)
        check_choices(script_args, training_args, model_args)
        check_packages(training_args, model_args)
        check_model_and_dataset_names(script_args, model_args)
        check_template(training_args)
        check_visible_gpus(training_args)
        check_sequence_parallelism(training_args)
        check_method_and_engine(training_args, model_args, allow)
        check_local_rows(script_args, training_args)
        silence_stop_warning(training_args)

        say_save_only_model(training_args)
        say_downloads(script_args, model_args)
        config = load_config(training_args, model_args)
        check_model_class(config, training_args, model_args)
        choose_attention(config, training_args, model_args)
        check_adapter_settings(config, training_args, model_args)
        check_fits(config, script_args, training_args, model_args)
        tokenizer_name = name_tokenizer(script_args, model_args)
        tokenizer = load_tokenizer(tokenizer_name, training_args, model_args)
        if tokenizer is not None:
            check_stop_token(tokenizer, training_args, tokenizer_name)
            check_pad_token(tokenizer, training_args, tokenizer_name, allow)
            check_compiled_for(script_args, training_args, tokenizer, allow)
        check_packing(config, training_args, allow)


def check_checkpoint(script_args: ScriptArguments, training_args: SFTConfig) -> None:
    """Raise UsageError for a checkpoint that cannot be gone on from exactly."""
    with refuse_on_all_ranks(training_args):
        run = read_run(training_args.resume_from_checkpoint)
        say_unknown_run(training_args.resume_from_checkpoint, run)
        check_engine_of_checkpoint(run, training_args)
        check_optimizer_state(training_args, script_args.allow)


def check_before_train(trainer: "SFTTrainer", script_args: ScriptArguments, model_args: ModelConfig) -> None:
    """Raise UsageError for what only the built trainer shows; say what is trained."""
    allow = script_args.allow
    with refuse_on_all_ranks(trainer.args):
        check_master_weights(trainer, model_args, allow)
        check_tied_embeddings(trainer)
        check_adapter_coverage(trainer, model_args, allow)
        check_own_template_arguments(trainer, script_args)
        check_personas(trainer, allow)
        check_trained_ends(trainer, allow)
        check_counts(trainer, allow)
        say_few_steps(trainer, script_args)
