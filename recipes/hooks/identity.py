"""A resume belongs to its run: run.json holds everything that determines the result.

Settings are compared before anything is loaded, contents before the first step: training tokens, template, tokenizer,
base weights, the adapters as PEFT built them, the number of steps. Every difference is named with both values and
refused, unless it changes nothing of what is trained (resume_rules.py) or `--allow` names it. What the checkpoint's
optimizer brings along, as its learning rate, takes the new value where that is allowed (SFTTrainer.take_values).
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from trl import ModelConfig, ScriptArguments, SFTConfig

from . import fingerprints, resume_rules
from .checkpoints import RUN, read_run, write_json
from .checks.engine import name_engine
from .differences import CONTENTS, Difference, find_differences, refuse_differences
from .messages import say
from .schedule import count_steps, describe_schedule
from .trainer import SFTTrainer

INIT_KWARGS_ELSEWHERE = ("dtype", "revision", "attn_implementation", "use_safetensors")  # compared by themselves
NOT_OF_ADAPTERS = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode")
NO_LAMBDA = {"reduce_lr_on_plateau", "greedy"}  # schedules with a state of another form than the others'
DEEPSPEED_SECTIONS = ("optimizer", "scheduler", "gradient_clipping")  # of its config, that determine the result


# -- settings, before anything is loaded ------------------------------------------------------------------------------
def describe_settings(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> dict[str, object]:
    """Return all settings that are not FREE, as they come back from JSON."""
    values = {**asdict(script_args), **asdict(model_args), **training_args.to_dict()}
    init_kwargs = dict(values["model_init_kwargs"] or {})
    values["attn_implementation"] = init_kwargs.get("attn_implementation")
    values["dtype"] = init_kwargs.get("dtype", values["dtype"])
    values["model_init_kwargs"] = {
        name: value for name, value in init_kwargs.items() if name not in INIT_KWARGS_ELSEWHERE
    }
    values["processes"] = training_args.world_size
    if training_args.deepspeed_plugin is not None:
        config = training_args.deepspeed_plugin.deepspeed_config
        values["deepspeed_config"] = {name: config.get(name) for name in DEEPSPEED_SECTIONS}
    settings = {}
    for name, value in values.items():
        if name not in resume_rules.FREE:
            settings[name] = value_or_code(value)
    return json.loads(json.dumps(settings, default=str))


def value_or_code(value: object) -> object:
    """Return a setting's value; of a Python file, as --optimizer names one, its name and a hash of its code."""
    if isinstance(value, str) and value.endswith(".py") and Path(value).is_file():
        return describe_code(Path(value))
    return value


def describe_code(path: Path) -> str:
    return f"{path.name} {fingerprints.hash_code(path.read_text(encoding='utf-8'))[:12]}"


def check_settings(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> dict[str, object]:
    """Return this run's settings. Raises UsageError where the checkpoint to resume is of a run with others."""
    now = describe_settings(script_args, training_args, model_args)
    checkpoint = training_args.resume_from_checkpoint
    if checkpoint:
        found = find_differences(read_run(checkpoint).get("settings", {}), now)
        not_loadable = find_not_loadable(found, training_args)
        refuse_differences(checkpoint, leave_out_rounding(found, now, False), not_loadable, script_args.allow)
    return now


def leave_out_rounding(found: list[Difference], settings: dict[str, object], has_router_loss: bool) -> list[Difference]:
    """Return the differences of settings that change more than rounding."""
    rounding = resume_rules.rounding_names(settings, has_router_loss)
    kept = []
    for difference in found:
        if difference.name in rounding or (difference.name == "optim" and is_same_optimizer(difference)):
            continue
        kept.append(difference)
    return kept


def is_same_optimizer(difference: Difference) -> bool:
    return any({difference.before, difference.now} <= values for values in resume_rules.SAME_STATE)


def find_not_loadable(found: list[Difference], training_args: SFTConfig) -> dict[str, str]:
    """Return {name: why the checkpoint cannot be loaded so} of a resume with these differences."""
    not_loadable = dict(resume_rules.NOT_LOADABLE)
    if training_args.deepspeed_plugin is not None:
        not_loadable.update(dict.fromkeys(resume_rules.CARRIED, "DeepSpeed loads the checkpoint's own"))
    if training_args.lr_scheduler_type.value in NO_LAMBDA:
        not_loadable["learning_rate"] = "the checkpoint's schedule has its own"
    for difference in found:
        if difference.name == "lr_scheduler_type" and {difference.before, difference.now} & NO_LAMBDA:
            not_loadable[difference.name] = "the checkpoint's schedule has another state"
        if difference.name == "optimizer" and difference.before.split()[0] != difference.now.split()[0]:
            not_loadable[difference.name] = "the checkpoint holds another optimizer's state"
    return not_loadable


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
        "recipe": describe_code(Path(sys.argv[0])),
        "mixed_precision": trainer.accelerator.mixed_precision,
        "template": fingerprints.hash_text(template),
        "tokenizer": fingerprints.hash_tokenizer(tokenizer),
        "data": fingerprints.hash_tokens(trainer.train_dataset),
        "adapters": describe_adapters(trainer),
        "start_adapter": trainer.start_adapter.hash() if trainer.start_adapter else None,
        "max_steps": count_steps(trainer),
        "base_model": model_args.model_name_or_path,
        "base_revision": model_args.model_revision,
    }
    revision = (args.model_init_kwargs or {}).get("revision", model_args.model_revision)
    folder = fingerprints.find_model_folder(model_args.model_name_or_path, revision)
    if folder is not None:
        contents["base_config"] = fingerprints.hash_config(folder)
        contents["base_weights"] = fingerprints.hash_weights(folder)
    return contents


def find_changed_contents(before: dict, now: dict, trainer: SFTTrainer) -> list[Difference]:
    """Return what differs of two describe_contents()."""
    names = [name for name in (*CONTENTS, "mixed_precision") if name in now]
    found = find_differences(before, {name: now[name] for name in names})
    found += find_differences(before.get("adapters", {}), now["adapters"], resume_rules.ADAPTER_FLAGS)
    steps_before = before.get("max_steps", now["max_steps"])
    if steps_before != now["max_steps"]:
        note = describe_schedule(trainer, trainer.args.resume_from_checkpoint, now["max_steps"])
        found.append(Difference("max_steps", steps_before, now["max_steps"], note))
    return found


def names_that_follow(changed: list[Difference]) -> list[str]:
    """Return which contents may differ because of settings that are allowed to."""
    names = {difference.name for difference in changed}
    follow = []
    if names & set(resume_rules.DATA_SETTINGS):
        follow += ["data", "max_steps"]
    if "global_batch_size" in names:
        follow.append("max_steps")
    return follow


def check_contents(
    trainer: SFTTrainer, model_args: ModelConfig, settings: dict[str, object], allow: list[str]
) -> list[str]:
    """Write run.json; return the names of what a resume changes. Raises UsageError for what is not allowed."""
    now = describe_contents(trainer, model_args)
    checkpoint = trainer.args.resume_from_checkpoint
    run = {"engine": name_engine(trainer.args), "settings": settings, "contents": now, "changes": []}
    changed = []
    if checkpoint:
        before = read_run(checkpoint)
        run["changes"] = before.get("changes", [])
        all_settings = find_differences(before.get("settings", {}), settings)
        changed = leave_out_rounding(all_settings, settings, trainer.aux_loss_enabled)
        for difference in all_settings:
            if difference not in changed:
                say(f"goes on with {difference.describe()}: the same rows a step, other rounding")
        contents = find_changed_contents(before.get("contents", {}), now, trainer)
        names = {difference.name for difference in changed}
        changed += [difference for difference in contents if difference.name not in names]
        allow = [*allow, *names_that_follow(changed)]
        refuse_differences(checkpoint, changed, find_not_loadable(changed, trainer.args), allow)
    for difference in changed:
        say(f"goes on with {difference.describe()}")
        run["changes"].append({"checkpoint": Path(checkpoint).name, **asdict(difference)})
    write_json(Path(trainer.args.output_dir) / RUN, run)
    return [difference.name for difference in changed]
