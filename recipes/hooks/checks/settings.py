"""Settings that argparse leaves unchecked: words of YAML files, and packages that are not installed."""

from dataclasses import fields
from importlib.util import find_spec

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.training_args import OptimizerNames
from trl import ModelConfig, ScriptArguments, SFTConfig

from ..messages import UsageError, say
from .suggestions import nearest_name

PIP_NAMES = {  # module: what pip installs, where it has another name
    "apollo_torch": "git+https://github.com/zhuhanqing/APOLLO",
    "azureml.core": "azureml-sdk",
    "comet_ml": "comet-ml",
    "flash_attn": "flash-attn --no-build-isolation",
    "flash_attn_interface": "flash-attn-3 --no-build-isolation",
    "flytekit": "flytekit flytekitplugins-deck-standard",
    "galore_torch": "git+https://github.com/jiaweizzhao/GaLore",
    "liger_kernel": "liger-kernel",
    "lomo_optim": "lomo-optim",
    "optimi": "torch-optimi",
    "torchdistx": "git+https://github.com/pytorch/torchdistx",
}
OPTIMIZER_MODULES = {  # word in the optimizer's name: module, the first that fits (transformers/trainer_optimizer.py)
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu": "torch_npu",
    "anyprecision": "torchdistx",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
    "8bit": "bitsandbytes",
    "32bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "ademamix": "bitsandbytes",
}
TRACKER_MODULES = {  # value of --report_to: modules, any of which will do
    "azure_ml": ("azureml.core",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),  # an address in the environment, no package
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
ATTENTION_MODULES = {  # kernels: transformers fetches the same kernels from the hub through it
    "flash_attention_2": ("flash_attn", "kernels"),
    "flash_attention_3": ("flash_attn_interface", "kernels"),
    "flash_attention_4": ("flash_attn.cute", "kernels"),
}


def check_choices(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise UsageError for a value that is none of its setting's choices; argparse sees only the command line."""
    for arguments in (script_args, training_args, model_args):
        for field in fields(arguments):
            choices = field.metadata.get("choices")
            value = getattr(arguments, field.name)
            if choices and value is not None and value not in choices:
                words = [str(choice) for choice in choices]
                nearest = nearest_name(str(value), words)
                raise UsageError(f"{field.name} {value}: no such value{nearest}: choose one of {', '.join(words)}")


def check_packages(training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise UsageError for a setting whose package is not installed; the trainer would say so after loading."""
    optimizer = OptimizerNames(training_args.optim).value
    optimizer_module = find_optimizer_module(optimizer)
    if optimizer_module is not None:
        require(f"--optim {optimizer}", optimizer_module)
    for tracker in training_args.report_to:
        check_tracker(tracker)
    check_attention(training_args, model_args)
    if training_args.use_liger_kernel:
        require("--use_liger_kernel true", "liger_kernel")
    if model_args.load_in_4bit:
        require("--load_in_4bit true", "bitsandbytes")
    if model_args.load_in_8bit:
        require("--load_in_8bit true", "bitsandbytes")


def say_save_only_model(training_args: SFTConfig) -> None:
    """Say what a run with --save_only_model cannot do later, before it is paid for."""
    if training_args.save_only_model:
        say("--save_only_model true: checkpoints hold no optimizer state: a resume cannot go on exactly")


def find_optimizer_module(optimizer: str) -> str | None:
    """Return the module that an optimizer needs beside torch, or None."""
    for word, module in OPTIMIZER_MODULES.items():
        if word in optimizer:
            return module
    return None


def check_tracker(tracker: str) -> None:
    if tracker not in TRACKER_MODULES:
        known = ", ".join(TRACKER_MODULES)
        nearest = nearest_name(tracker, TRACKER_MODULES)
        raise UsageError(f"--report_to {tracker}: no such tracker{nearest}: choose one of {known}, or none")
    modules = TRACKER_MODULES[tracker]
    if modules:
        require(f"--report_to {tracker}", *modules)


def check_attention(training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raise UsageError for an attention that transformers does not know, or whose package is not installed.

    A name with a slash or a colon is a kernel of the hub.
    """
    init_kwargs = training_args.model_init_kwargs or {}
    attention = init_kwargs.get("attn_implementation") or model_args.attn_implementation
    if attention is None or "/" in attention or ":" in attention:
        return
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if attention.removeprefix("paged|") not in known:
        nearest = nearest_name(attention, known)
        raise UsageError(
            f"--attn_implementation {attention}: no such attention{nearest}: choose one of {', '.join(known)}"
        )
    if attention in ATTENTION_MODULES:
        require(f"--attn_implementation {attention}", *ATTENTION_MODULES[attention])


def require(setting: str, *modules: str) -> None:
    """Raise UsageError unless one of the modules is installed; the sentence names the first."""
    for module in modules:
        if is_installed(module):
            return
    package = modules[0].partition(".")[0]
    pip_name = PIP_NAMES.get(modules[0], package)
    raise UsageError(f"{setting} needs the package {package}: pip install {pip_name}")


def is_installed(module: str) -> bool:
    """Return whether a module can be imported; a folder of that name without code, as runs leave, is none."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # of a parent
        return False
    return spec is not None and spec.origin is not None
