"""The rules of gate.py: a list in YAML, whose keys are in gate.py's docstring."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from data_prep.common.errors import UsageError

LIMITS = ("min", "max", "max_drop", "max_rise", "max_ratio")
AGAINST_BASE = ("max_drop", "max_rise", "max_ratio")
KEYS = {"metric": str, "benchmark": str, "by": str, "group": str, "required": bool, **dict.fromkeys(LIMITS, float)}
KINDS_OF_VALUES = {str: "a name", bool: "true or false", float: "a number"}


@dataclass
class Rule:
    """What a metric must meet. benchmark: "" is compare.py. by: a kind of groups, group: one of them; "" is all."""

    metric: str
    limits: dict[str, float]
    benchmark: str = ""
    by: str = ""
    group: str = ""
    required: bool = True

    @property
    def looks_at_value(self) -> bool:
        return "min" in self.limits or "max" in self.limits

    @property
    def looks_at_base(self) -> bool:
        return any([limit in self.limits for limit in AGAINST_BASE])

    @property
    def limits_harm(self) -> bool:
        return any([limit in self.limits for limit in ("max", "max_rise", "max_ratio")])

    def __str__(self) -> str:
        """Return it as one would say it: mmlu accuracy, source (each): min 0.5, max_drop 0.02."""
        name = f"{self.benchmark} {self.metric}".strip()
        if self.by:
            name += f", {self.by} {self.group or '(each)'}"
        limits = [f"{limit} {value:g}" for limit, value in self.limits.items()]
        return f"{name}: {', '.join(limits)}"


def read_rules(path: Path) -> list[Rule]:
    """Return the rules of a YAML file. Raises UsageError with the line of what is wrong."""
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"the rules {path} cannot be read ({error.strerror}): pass --rules with a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = ""
        if mark:
            line = f", line {mark.line + 1},"
        raise UsageError(f"{path}{line} is not YAML ({getattr(error, 'problem', error)}): repair it") from None
    if not isinstance(tree, yaml.SequenceNode) or not tree.value:
        raise UsageError(f"{path} holds no list of rules: begin each with `- metric: NAME`")
    return [read_rule(path, node) for node in tree.value]


def refuse(path: Path, node: yaml.Node, sentence: str) -> NoReturn:
    raise UsageError(f"{path}, line {node.start_mark.line + 1}: {sentence}")


def read_rule(path: Path, node: yaml.Node) -> Rule:
    """Return the rule of a YAML mapping. Raises UsageError."""
    if not isinstance(node, yaml.MappingNode):
        refuse(path, node, "a rule is `- metric: NAME` with a limit below it")
    values = {}
    for key, value_node in node.value:
        name = key.value
        value = yaml.SafeLoader("").construct_object(value_node)
        if name not in KEYS:
            refuse(path, key, f"unknown key {name!r}: a rule has {', '.join(KEYS)}")
        if name in values:
            refuse(path, key, f"{name} stands twice in this rule: remove one")
        if not is_of_kind(value, KEYS[name]):
            refuse(path, value_node, f"{name} is {value!r}: give {KINDS_OF_VALUES[KEYS[name]]}")
        values[name] = value
    if "metric" not in values:
        refuse(path, node, "a rule without a metric: add `metric: NAME`")
    limits = {name: values.pop(name) for name in LIMITS if name in values}
    if not limits:
        refuse(path, node, f"{values['metric']} has no limit: give one of {', '.join(LIMITS)}")
    if "group" in values and "by" not in values:
        refuse(path, node, f"the group {values['group']!r} needs its kind: add `by: source`, or mode, …")
    return Rule(limits=limits, **values)


def is_of_kind(value: object, kind: type) -> bool:
    if kind is not float:
        return isinstance(value, kind)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
