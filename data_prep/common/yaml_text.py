"""Read YAML without losing a key."""

from pathlib import Path

import yaml

from .errors import UsageError


def load_yaml(path: str | Path) -> object:
    """Return the value of a YAML file.

    Raises UsageError where a key stands twice in one mapping, OSError, UnicodeDecodeError and yaml.YAMLError where the
    file cannot be read.
    """
    loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
    node = loader.get_single_node()
    if node is None:
        return None
    check_keys(node, path)
    return loader.construct_document(node)


def check_keys(node: yaml.Node, path: str | Path) -> None:
    """Raise UsageError where a key stands twice in one mapping: YAML would take the last one without a word."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_keys(item, path)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    line = key.start_mark.line + 1
                    raise UsageError(f"{path}:{line}: {key.value} stands twice: leave one of the two out")
                keys.add(key.value)
            check_keys(value, path)
