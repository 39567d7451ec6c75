"""A resume belongs to its run: run.json holds everything that determines the result.

Settings are compared before anything is loaded, contents before the first step: training tokens, template, tokenizer,
base weights, the adapters as PEFT built them, the number of steps. Every difference is named with both values and
refused, unless it changes nothing of what is trained (resume_rules.py) or `--allow` names it. What the checkpoint's
optimizer brings along, as its learning rate, takes the new value where that is allowed (SFTTrainer.take_values).
"""

import json
from dataclasses import asdict
from pathlib import Path

from trl import ModelConfig, ScriptArguments, SFTConfig

from . import fingerprints, resume_rules
from .checkpoints import RUN, read_run, write_json
from .checks.engine import name_engine
from .differences import CONTENTS, Difference, find_differences, refuse_differences
from .messages import recipe_name, relative_path, say
from .schedule import count_steps, describe_schedule
from .trainer import SFTTrainer

INIT_KWARGS_ELSEWHERE = ("dtype", "revision", "attn_implementation", "use_safetensors")  # compared by their flags
NOT_OF_ADAPTERS = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode")
NO_LAMBDA = ("reduce_lr_on_plateau", "greedy")  # schedules with a state of another form than the others'


# -- settings, before anything is loaded ------------------------------------------------------------------------------
def describe_settings(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> dict[str, object]:
    """Return all settings that are not FREE, as they come back from JSON."""
    values = {**asdict(script_args), **asdict(model_args), **training_args.to_dict()}
    init_kwargs = dict(values["model_init_kwargs"] or {})
    values["attn_implementation"] = init_kwargs.get("attn_implementation")
    for name in INIT_KWARGS_ELSEWHERE:
        init_kwargs.pop(name, None)
    values["model_init_kwargs"] = init_kwargs
    values["processes"] = training_args.world_size
    settings = {}
    for name, value in values.items():
        if name not in resume_rules.FREE:
            settings[name] = value_or_code(value)
    return json.loads(json.dumps(settings, default=str))


def value_or_code(value: object) -> object:
    """Return a setting's value; of a Python file, as --optimizer names one, its name and a hash of its text."""
    if isinstance(value, str) and value.endswith(".py") and Path(value).is_file():
        digest = fingerprints.hash_text(Path(value).read_text(encoding="utf-8"))
        return f"{Path(value).name} {digest[:12]}"
    return value


def check_settings(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> dict[str, object]:
    """Return this run's settings. Raises UsageError where the checkpoint to resume is of a run with others."""
    now = describe_settings(script_args, training_args, model_args)
    checkpoint = training_args.resume_from_checkpoint
    if not checkpoint:
        return now
    run = read_run(checkpoint)
    if not run:
        say(f"{relative_path(checkpoint)} has no {RUN} beside it: whether it is of the same run is not checked")
    not_loadable = dict(resume_rules.NOT_LOADABLE)
    if training_args.deepspeed_plugin is not None:
        not_loadable.update(dict.fromkeys(resume_rules.CARRIED, "DeepSpeed loads the checkpoint's own"))
    found = []
    for difference in find_differences(run.get("settings", {}), now):
        if difference.name in resume_rules.ROUNDING:
            say(f"goes on with {difference.describe()}: the same rows a step, other rounding")
            continue
        found.append(difference)
        if difference.name == "lr_scheduler_type" and {difference.before, difference.now} & set(NO_LAMBDA):
            not_loadable[difference.name] = "the checkpoint's schedule has another state"
    refuse_differences(checkpoint, found, not_loadable, script_args.allow)
    return now


# -- contents, before the first step ----------------------------------------------------------------------------------
def describe_adapters(trainer: SFTTrainer) -> dict[str, object]:
    """Return PEFT's config as it was resolved on the model, empty without adapters."""
    configs = getattr(trainer.model, "peft_config", None)
    if not configs:
        return {}
    config = next(iter(configs.values()))
    adapters = {}
    for name, value in config.to_dict().items():
        if name in NOT_OF_ADAPTERS:
            continue
        if isinstance(value, set | list | tuple):
            value = sorted(map(str, value))
        adapters[name] = value
    return json.loads(json.dumps(adapters, default=str))


def describe_contents(trainer: SFTTrainer, model_args: ModelConfig) -> dict[str, object]:
    """Return what the settings lead to: hashes of CONTENTS, the adapters, the number of steps, the base's name."""
    args = trainer.args
    tokenizer = trainer.processing_class
    template = str(tokenizer.chat_template)
    if Path(str(args.chat_template_path)).is_file():
        template = Path(args.chat_template_path).read_text(encoding="utf-8")
    contents = {
        "recipe": recipe_name(),
        "template": fingerprints.hash_text(template),
        "tokenizer": fingerprints.hash_tokenizer(tokenizer),
        "data": fingerprints.hash_tokens(trainer.train_dataset),
        "adapters": describe_adapters(trainer),
        "max_steps": count_steps(trainer),
        "base_model": model_args.model_name_or_path,
        "base_revision": model_args.model_revision,
    }
    folder = fingerprints.find_model_folder(model_args.model_name_or_path, model_args.model_revision)
    if folder is not None:
        contents["base_config"] = fingerprints.hash_config(folder)
        contents["base_weights"] = fingerprints.hash_weights(folder)
    return contents


def find_changed_contents(before: dict, now: dict, trainer: SFTTrainer) -> list[Difference]:
    """Return what differs of two describe_contents()."""
    found = find_differences(before, {name: now[name] for name in CONTENTS if name in now})
    for difference in find_differences(before.get("adapters", {}), now["adapters"], resume_rules.ADAPTER_FLAGS):
        found.append(difference)
    steps_before = before.get("max_steps", now["max_steps"])
    if steps_before != now["max_steps"]:
        note = describe_schedule(trainer, trainer.args.resume_from_checkpoint, now["max_steps"])
        found.append(Difference("max_steps", steps_before, now["max_steps"], note))
    return found


def check_contents(
    trainer: SFTTrainer, model_args: ModelConfig, settings: dict[str, object], allow: list[str]
) -> list[str]:
    """Write run.json; return the names of the settings that a resume changes. Raises UsageError."""
    now = describe_contents(trainer, model_args)
    checkpoint = trainer.args.resume_from_checkpoint
    before = read_run(checkpoint)
    changes = find_differences(before.get("settings", {}), settings)  # check_settings has let them pass
    names = [difference.name for difference in changes if difference.name not in resume_rules.ROUNDING]
    if before:
        found = find_changed_contents(before["contents"], now, trainer)
        changes += refuse_differences(checkpoint, found, resume_rules.NOT_LOADABLE, allow)
    told = before.get("changes", [])
    for difference in changes:
        if difference.name not in resume_rules.ROUNDING:
            say(f"goes on with {difference.describe()}")
        told.append({"checkpoint": Path(checkpoint).name, **asdict(difference)})
    run = {"engine": name_engine(trainer.args), "settings": settings, "contents": now, "changes": told}
    write_json(Path(trainer.args.output_dir) / RUN, run)
    return names
