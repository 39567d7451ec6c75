"""What a recipe calls, in the order of a run."""

from pathlib import Path

import transformers.dynamic_module_utils
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import ModelConfig, ScriptArguments, SFTConfig

from .arguments import TrlParser
from .checkpoints import choose_checkpoint, on_main_process
from .checks import check_before_load, check_before_train, check_checkpoint, check_output_dir
from .checks.devices import prepare_gpu
from .checks.ranks import refuse_on_all_ranks
from .checks.rows import check_rows as check_loaded_rows
from .end_block import print_end_block
from .heartbeat import Heartbeat
from .identity import check_contents, check_settings
from .kl_to_base import KLToBase
from .log_file import LogFile
from .parity import keep_fp32_under_zero
from .progress import Progress
from .provenance import write_provenance
from .quiet import hide_progress_bars
from .refusals import Refusals
from .run_lock import lock_folder, release_folder
from .start_adapter import load_start_adapter, take_start_adapter
from .step_rate import StepRate
from .trainer import SFTTrainer
from .user_hooks import import_hook_files, make_callbacks


def before_load(
    parser: TrlParser, script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> None:
    """Refuse what can be refused before anything is downloaded; hold the output folder; verify the checkpoint.

    Raises UsageError, which ends the run with its sentence.
    """
    Refusals(script_args, training_args, model_args).install()
    hide_progress_bars()
    # Python code that comes with a model is refused, not asked about; weights that can hold code are not loaded
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    training_args.model_init_kwargs.setdefault("use_safetensors", True)
    import_hook_files(script_args.hooks)
    if script_args.adapter:
        with refuse_on_all_ranks(training_args):
            parser.settings |= take_start_adapter(script_args, training_args, model_args)
    check_before_load(script_args, training_args, model_args)
    on_main_process(lambda: lock_folder(training_args.output_dir))
    on_main_process(lambda: check_output_dir(training_args))
    training_args.resume_from_checkpoint = choose_checkpoint(training_args)
    check_checkpoint(script_args, training_args)
    parser.run_settings = check_settings(script_args, training_args, model_args)
    keep_fp32_under_zero(training_args, model_args)
    prepare_gpu(training_args)
    if not training_args.run_name:
        training_args.run_name = Path(training_args.output_dir).name  # in trackio and W&B: not a random one


def check_rows(
    script_args: ScriptArguments, training_args: SFTConfig, train: Dataset, validation: Dataset | None
) -> None:
    """Refuse rows that cannot be trained, before the model is loaded. Raises UsageError."""
    check_loaded_rows(script_args, training_args, train, validation)


def before_train(trainer: SFTTrainer, parser: TrlParser, script_args: ScriptArguments, model_args: ModelConfig) -> None:
    """Check the model and the tokens that will be trained, and add what watches and shows the run.

    Raises UsageError.
    """
    if script_args.adapter:
        with refuse_on_all_ranks(trainer.args):
            load_start_adapter(trainer, Path(script_args.adapter))
    check_before_train(trainer, script_args, model_args)
    if script_args.kl_weight:
        trainer.kl = KLToBase(trainer, script_args.kl_weight)
    trainer.changed_settings = on_main_process(
        lambda: check_contents(trainer, model_args, parser.run_settings, script_args.allow)
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    for callback in (
        Heartbeat(trainer),
        LogFile(trainer),
        Progress(trainer, script_args, model_args),
        StepRate(trainer),
    ):
        trainer.add_callback(callback)
    for callback in make_callbacks(script_args.hooks, trainer):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        write_provenance(Path(trainer.args.output_dir), parser.settings)
    trainer.signals.listen()


def after_train(trainer: SFTTrainer, script_args: ScriptArguments, model_args: ModelConfig) -> None:
    """Say what the run has come to and which commands follow; let the other ranks go."""
    print_end_block(trainer, script_args, model_args)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Heartbeat):
            callback.done()
    release_folder(trainer.args.output_dir)
