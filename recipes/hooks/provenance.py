"""What a run folder keeps of how it came about: the recipe's source, its settings, the packages that were imported, the
machine."""

import json
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch
import yaml

from .messages import recipe_name


def write_provenance(output_dir: Path, settings: dict[str, object]) -> None:
    """Write the recipe's source, config.yaml (which --config takes back), versions.json and machine.json."""
    output_dir.mkdir(parents=True, exist_ok=True)
    shutil.copy(sys.argv[0], output_dir / recipe_name())
    (output_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    (output_dir / "versions.json").write_text(json.dumps(imported_versions(), indent=1))
    (output_dir / "machine.json").write_text(json.dumps(describe_machine(), indent=1))


def describe_machine() -> dict[str, object]:
    """Return what a run's speed and memory depend on, of the main process' machine. ram_gib: None where unknown."""
    ram_gib = None
    if hasattr(os, "sysconf"):  # not on Windows
        ram_gib = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({"name": properties.name, "gib": round(properties.total_memory / 2**30, 1)})
    return {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "ram_gib": ram_gib,
        "gpus": gpus,
        "cuda": torch.version.cuda,  # None in a build for CPUs
    }


def imported_versions() -> dict[str, str]:
    """Return the version of every package that is imported, python's too.

    A package can be installed twice on the path, or be a checkout without an installation: what counts is where the
    module was imported from.
    """
    versions = {"python": sys.version.split()[0]}
    distributions = find_distributions()
    for module_name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." in module_name or not file:
            continue
        folder = Path(file).resolve().parent
        if Path(file).name.startswith("__init__."):
            folder = folder.parent
        distribution = distributions.get((module_name, folder))
        version = getattr(module, "__version__", None)
        if distribution is not None:
            versions[distribution.metadata["Name"]] = distribution.version
        elif isinstance(version, str):
            versions[module_name] = version
    return dict(sorted(versions.items()))


def find_distributions() -> dict[tuple[str, Path], metadata.Distribution]:
    """Return {(module, folder that it is imported from): the installed distribution that brings it}."""
    found = {}
    for distribution in metadata.distributions():
        folder = Path(str(distribution.locate_file(""))).resolve()
        for module_name in top_level_names(distribution):
            found.setdefault((module_name, folder), distribution)
    return found


def top_level_names(distribution: metadata.Distribution) -> set[str]:
    """Return the names of the modules that a distribution installs, by its list of files."""
    names = set()
    for file in distribution.files or []:
        first = file.parts[0]
        if len(file.parts) > 1:
            names.add(first)
        elif first.endswith((".py", ".so")):
            names.add(first.partition(".")[0])
    return names
