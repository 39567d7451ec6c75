"""A model's config, from a folder, the hub or known_configs/, and which of its layers are alike."""

import contextlib
import copy
import functools
import json
import logging
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from .errors import UsageError

HUB_TIMEOUT = 3  # seconds
QUIET = ("torch._subclasses.fake_tensor", "transformers")
KNOWN_CONFIGS = Path(__file__).with_name("known_configs")
MADE_OF = (  # what a name ends in beside the shapes' own
    *("-Instruct-2507", "-Thinking-2507", "-Instruct-2512-BF16", "-Instruct", "-instruct", "-it", "-Base"),
    "-checkpoints",
)


@dataclass
class LoadedConfig:
    config: PreTrainedConfig
    source: str  # in words


def load_config(name: str, revision: str | None = None) -> LoadedConfig:
    """Return the config of a local folder or a hub id; where the hub cannot be reached, of known_configs/.

    Raises UsageError.
    """
    is_local = Path(name).is_dir()
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, local_files_only=not is_hub_reached())
        source = "its own config.json" if is_local else "the hub's config.json"
        return LoadedConfig(config.get_text_config(), source)
    except (OSError, ValueError) as error:
        if is_local:
            reason = " ".join(str(error).split())
            raise UsageError(f"{name}: no config can be read there ({reason}): pass a model's folder") from None
    known = find_known_config(name)
    if known is None:
        names = ", ".join(sorted(path.stem for path in KNOWN_CONFIGS.glob("*.json")))
        raise UsageError(
            f"{name}: no such folder, and the hub cannot be reached or has no such model: pass a folder with its "
            f"config.json as --model_name_or_path, or one of the known shapes: {names}"
        )
    values = json.loads(known.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(**values)
    return LoadedConfig(config, f"data_prep/common/known_configs/{known.name}, as the hub cannot be reached")


@functools.cache
def is_hub_reached() -> bool:
    """Return whether the hub answers, asked once for a few seconds: its client would try for half a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def find_known_config(name: str) -> Path | None:
    """Return the file of known_configs with the shapes of a hub id, None if there is none."""
    short = name.split("/")[-1]
    for ending in MADE_OF:
        short = short.removesuffix(ending)
    path = KNOWN_CONFIGS / f"{short}.json"
    return path if path.is_file() else None


def shorten(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return a config with its first layers alone: lists with an entry a layer are cut too."""
    short = copy.deepcopy(config)
    for name, value in vars(short).items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(short, name, value[:layers])
    short.num_hidden_layers = layers
    return short


def find_layers(model: torch.nn.Module, count: int) -> list[torch.nn.Module]:
    """Return the decoder layers of a model: its outermost list of that many modules. Raises UsageError."""
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    raise UsageError(f"{type(model).__name__}: no list of {count} decoder layers is found in it: it cannot be traced")


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Return a word for each layer, the same for layers of the same modules, shapes and per-layer settings."""
    with torch.device("meta"), no_init_weights(), quiet():
        model = AutoModelForCausalLM.from_config(config)
    count = config.num_hidden_layers
    per_layer = [value for value in vars(config).values() if isinstance(value, list) and len(value) == count]
    kinds = []
    for number, layer in enumerate(find_layers(model, count)):
        shapes = [(name, tuple(weight.shape)) for name, weight in layer.named_parameters()]
        settings = [value[number] for value in per_layer]
        kinds.append(repr((shapes, settings)))
    return kinds


@dataclass(frozen=True)
class LayerPlan:
    """Two numbers of layers to trace, and how many layers lie between them; few == many: the whole model is traced."""

    few: int
    many: int
    period: int


def plan_layers(kinds: list[str], every_n_layers: int = 1) -> LayerPlan:
    """Return which numbers of layers to trace so that the rest follows: a model repeats its kinds after a beginning."""
    count = len(kinds)
    marked = [(kind, number % every_n_layers) for number, kind in enumerate(kinds)]
    best = LayerPlan(count, count, 1)
    for period in range(1, count // 3 + 1):
        first = 0  # where the repetition begins
        for number in range(count - period):
            if marked[number] != marked[number + period]:
                first = number + 1
        few = max(first + period, 2 * period)
        few += (count - few) % period
        if few + period < best.many:
            best = LayerPlan(few, few + period, period)
    return best


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out warnings, and torch's tracebacks of what fails under fake tensors: the error itself says it.

    transformers' too: it warns of kernels that this machine has not, and the GPU has.
    """
    loggers = [logging.getLogger(name) for name in QUIET]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
