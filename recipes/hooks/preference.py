"""What the preference recipe calls: the checks and files of these hooks that do not depend on SFT's rows and batches.

TRL's DPOTrainer has batches of pairs without labels and a loss of another size, so that it is trained as it is.
"""

from pathlib import Path

import transformers.dynamic_module_utils
from accelerate import ParallelismConfig
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments

from .arguments import TrlParser
from .checkpoints import choose_checkpoint, on_main_process
from .checks.adapter_coverage import check_adapter_coverage, check_adapter_settings
from .checks.allowed import check_allowed_names
from .checks.checkpoint import check_engine_of_checkpoint, check_optimizer_state, check_output_dir
from .checks.devices import check_visible_gpus, prepare_gpu
from .checks.engine import check_master_weights, check_method_and_engine, check_model_class, load_config
from .checks.paths import check_model_and_dataset_names
from .checks.ranks import refuse_on_all_ranks
from .checks.settings import check_choices, check_packages
from .log_file import LogFile
from .messages import UsageError, relative_path, say
from .provenance import write_provenance
from .quiet import hide_progress_bars
from .refusals import Refusals
from .run_lock import lock_folder, release_folder
from .start_adapter import take_start_adapter
from .user_hooks import import_hook_files, make_callbacks

LEFT_OUT = (
    "preference training: settings, model, adapters and folder are checked; rows, template, sealed checkpoints, "
    "signals, run.json, speed and the watch over steps are of SFT alone and left out"
)


def before_load(
    parser: TrlParser, script_args: ScriptArguments, training_args: DPOConfig, model_args: ModelConfig
) -> None:
    """Refuse what can be refused before anything is downloaded, and hold the output folder. Raises UsageError."""
    Refusals(script_args, training_args, model_args).install()
    hide_progress_bars()
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # as in run.py
    training_args.model_init_kwargs.setdefault("use_safetensors", True)
    import_hook_files(script_args.hooks)
    say(LEFT_OUT)
    with refuse_on_all_ranks(training_args):
        check_settings(script_args, training_args, model_args)
        if script_args.adapter:
            parser.settings |= take_start_adapter(script_args, training_args, model_args)
        config = load_config(training_args, model_args)
        check_model_class(config, training_args, model_args)
        check_adapter_settings(config, training_args, model_args)
    on_main_process(lambda: lock_folder(training_args.output_dir))
    on_main_process(lambda: check_output_dir(training_args))
    training_args.resume_from_checkpoint = choose_checkpoint(training_args)
    with refuse_on_all_ranks(training_args):
        check_engine_of_checkpoint({}, training_args)
        check_optimizer_state(training_args, script_args.allow)
    prepare_gpu(training_args)
    if not training_args.run_name:
        training_args.run_name = Path(training_args.output_dir).name


def check_settings(script_args: ScriptArguments, training_args: DPOConfig, model_args: ModelConfig) -> None:
    """Raise UsageError for settings that no preference run can have."""
    if script_args.kl_weight:
        raise UsageError("--kl_weight: the loss has its own hold on the reference: pass a larger --beta")
    if ParallelismConfig().non_data_parallel_size > 1:
        raise UsageError("TRL's DPOTrainer is tried with whole rows alone: take an accelerate config without sp or tp")
    template = script_args.chat_template_path
    if template is not None and not Path(template).is_file():
        raise UsageError(f"--chat_template_path {template}: no such file; the templates are in chat_templates/")
    check_allowed_names(script_args.allow, script_args, training_args, model_args)
    check_choices(script_args, training_args, model_args)
    check_packages(training_args, model_args)
    check_model_and_dataset_names(script_args, model_args)
    check_visible_gpus(training_args)
    check_method_and_engine(training_args, model_args, script_args.allow)


def before_train(trainer: DPOTrainer, parser: TrlParser, script_args: ScriptArguments, model_args: ModelConfig) -> None:
    """Check the model that will be trained; keep log.jsonl, settings and versions. Raises UsageError."""
    with refuse_on_all_ranks(trainer.args):
        check_master_weights(trainer, model_args, script_args.allow)
        check_adapter_coverage(trainer, model_args, script_args.allow)
    trainer.add_callback(LogFile(trainer))
    for callback in make_callbacks(script_args.hooks, trainer):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        write_provenance(Path(trainer.args.output_dir), parser.settings)
        validation = 0 if trainer.eval_dataset is None else len(trainer.eval_dataset)
        say(f"{len(trainer.train_dataset):,} pairs, validation {validation:,}")


def after_train(trainer: DPOTrainer) -> None:
    """Say where the result lies; let go of its folder."""
    say(f"done: {relative_path(trainer.args.output_dir)}, with its tokenizer and template; log.jsonl has the margins")
    release_folder(trainer.args.output_dir)
