"""A run that trains on from an adapter: `--adapter runs/x`.

The folder of a run, or one of its checkpoints, gives the weights to start from; optimizer, schedule and rows are this
run's. Rank, alpha and layers are the adapter's own: they decide its shape and its size beside the base. Its base must
be this run's, by its weights where both can be read, else by its name. Where the settings say something else, a
sentence says what is taken. Dropout has no weights and stays this run's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftConfig
from trl import ModelConfig, ScriptArguments, SFTConfig

from . import fingerprints
from .checkpoints import checksum, read_run
from .differences import show_value
from .messages import UsageError, relative_path, say

if TYPE_CHECKING:
    from .trainer import SFTTrainer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TAKEN = {  # field of PEFT's config: the setting
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
OWN = {  # of PEFT's config: changes no weight that is loaded, or is compared by itself
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "task_type"),
    *("peft_type", "lora_dropout", "init_lora_weights", "layers_pattern", "megatron_core", "qalora_group_size"),
}
PLAIN_STARTS = (True, False, "gaussian")  # values of init_lora_weights that leave the base's weights as they are


@dataclass(frozen=True)
class StartAdapter:
    """An adapter to start from: its folder and PEFT's config of it."""

    folder: Path
    config: LoraConfig

    def hash(self) -> str:
        """Return a hash of its weights, for run.json."""
        return checksum(self.folder / WEIGHTS)[1]


def read_start_adapter(folder: Path) -> StartAdapter:
    """Return the adapter of a folder. Raises UsageError where there is none that a recipe can train on."""
    name = relative_path(folder)
    if not (folder / CONFIG).is_file():
        raise UsageError(f"--adapter {name}: no {CONFIG} there: pass the folder of a run with adapters or a checkpoint")
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"--adapter {name}: no {WEIGHTS} there, and other files of weights can run code: pass another")
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise UsageError(f"--adapter {name}: {CONFIG} cannot be read ({error})") from None
    if not isinstance(config, LoraConfig):
        raise UsageError(f"--adapter {name}: holds {config.peft_type.value} and no LoRA: pass another")
    unknown = find_unknown_fields(config)
    if unknown:
        raise UsageError(
            f"--adapter {name}: its {CONFIG} has what no setting of a recipe says ({', '.join(unknown)}): merge it "
            "(python -m eval.merge) and train a new adapter on the result"
        )
    return StartAdapter(folder, config)


def find_unknown_fields(config: LoraConfig) -> list[str]:
    """Return the fields of an adapter's config, with their values, that no setting of a recipe can repeat."""
    plain = LoraConfig().to_dict()
    unknown = []
    for name, value in config.to_dict().items():
        if name not in TAKEN and name not in OWN and value != plain.get(name):
            unknown.append(f"{name} {show_value(value)}")
    if config.init_lora_weights not in PLAIN_STARTS:
        unknown.append(f"init_lora_weights {config.init_lora_weights}")
    return unknown


# -- before the model is loaded ---------------------------------------------------------------------------------------
def take_start_adapter(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> dict[str, object]:
    """Set what model_args says of adapters to what --adapter has; return {setting: value} of what was another.

    Raises UsageError for a run that cannot start from it.
    """
    if not model_args.use_peft:
        raise UsageError(
            "--adapter: full fine-tuning trains no adapter: pass --use_peft true, or merge it (python -m eval.merge) "
            "and pass the result as --model_name_or_path"
        )
    plugin = training_args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise UsageError("--adapter: ZeRO-3 cuts the weights before they could be loaded: take zero2, DDP or FSDP2")
    adapter = read_start_adapter(Path(script_args.adapter))
    check_base(adapter, model_args)
    taken = {}
    words = []
    for field, setting in TAKEN.items():
        value = getattr(adapter.config, field)
        if isinstance(value, set | tuple | list):
            value = sorted(value)
        before = getattr(model_args, setting)
        setattr(model_args, setting, value)
        if not is_same(before, value):
            taken[setting] = value
            words.append(f"{setting} {show_value(value)} (the settings: {show_value(before)})")
    if words:
        say(f"--adapter {relative_path(adapter.folder)}: takes its {', '.join(words)}")
    return taken


def is_same(one: object, other: object) -> bool:
    """Return whether two values of a setting are the same; lists in any order, one name alone or in a list."""
    values = []
    for value in (one, other):
        if isinstance(value, str):
            value = [value]
        values.append(sorted(value) if isinstance(value, list) else value)
    return values[0] == values[1]


def check_base(adapter: StartAdapter, model_args: ModelConfig) -> None:
    """Raise UsageError for an adapter of another base than this run's."""
    base = adapter.config.base_model_name_or_path
    name = model_args.model_name_or_path
    before = find_hash_of_base(adapter)
    now = hash_of_model(name, model_args.model_revision)
    if before is not None and now is not None:
        same = before == now
    else:
        same = base == name
    if same:
        return
    folder = relative_path(adapter.folder)
    if base == name:
        raise UsageError(
            f"--adapter {folder} was trained on other weights of {base} than these: pass the same --model_revision or "
            "folder as its run"
        )
    raise UsageError(
        f"--adapter {folder} was trained on {base}, and --model_name_or_path is {name}: pass --model_name_or_path "
        f"{base}, or an adapter of {name}"
    )


def find_hash_of_base(adapter: StartAdapter) -> str | None:
    """Return the hash of the weights that an adapter was trained on, by its run, else by its base where it is here."""
    contents = read_run(str(adapter.folder)).get("contents", {})
    if contents.get("base_weights"):
        return contents["base_weights"]
    base = adapter.config.base_model_name_or_path
    return hash_of_model(base, adapter.config.revision) if base else None


def hash_of_model(name: str, revision: str | None) -> str | None:
    """Return a hash of a model's weights, None where they are not on this machine."""
    folder = fingerprints.find_model_folder(name, revision)
    return None if folder is None else fingerprints.hash_weights(folder)


# -- before the first step --------------------------------------------------------------------------------------------
def load_start_adapter(trainer: "SFTTrainer", folder: Path) -> None:
    """Load an adapter's weights into those that the recipe has built, as PEFT loads them.

    Raises UsageError where names or shapes of weights do not fit.
    """
    name = relative_path(folder)
    try:
        result = trainer.model.load_adapter(str(folder), "default", is_trainable=True, torch_device="cpu")
    except RuntimeError as error:  # shapes
        lines = str(error).splitlines()
        raise UsageError(f"--adapter {name}: does not fit this model: {lines[-1].strip()}") from None
    odd = [*result.missing_keys, *result.unexpected_keys]
    if odd:
        raise UsageError(
            f"--adapter {name}: {len(odd)} weights of it and of this model do not match, as {odd[0]}: pass an adapter "
            "that was trained on this model by this recipe"
        )
    trainer.start_adapter = StartAdapter(folder, trainer.model.peft_config["default"])
    say(f"trains on from adapter {name}")
