"""A compiled set: rows of tokens, labels and packs that data_prep/compile.py made once."""

import copy
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig

from data_prep.common.rendering import hash_tokenizer

from ..messages import UsageError

CONFIG = "recipes/configs/compiled.yaml"
SETTINGS = {  # with any other, TRL packs or mixes such rows once more
    "packing": False,
    "assistant_only_loss": False,
    "padding_free": True,
    "max_length": None,
    "per_device_train_batch_size": 1,
}


def is_compiled(column_names: Iterable[str]) -> bool:
    return "input_ids" in column_names


def check_settings_of_other_rows(dataset_name: str, training_args: SFTConfig) -> None:
    """Raise UsageError for rows of messages under the settings of compiled sets: every token would be trained."""
    for name in ("packing", "assistant_only_loss", "padding_free", "max_length"):
        if getattr(training_args, name) != SETTINGS[name]:
            return
    raise UsageError(
        f"dataset {dataset_name}: its rows are not compiled, and the settings of compiled sets would train every token "
        f"of them: leave out {CONFIG}, or compile them (python -m data_prep.compile {dataset_name} --recipe RECIPE "
        "--out PACKS)"
    )


def check_compiled_settings(dataset_name: str, training_args: SFTConfig) -> None:
    """Raise UsageError unless a compiled set is trained as it is; name the settings that are wrong."""
    wrong = []
    for name, value in SETTINGS.items():
        current = getattr(training_args, name)
        if current != value:
            wrong.append(f"{name} is {current} and not {value}")
    if wrong:
        raise UsageError(
            f"--dataset_name {dataset_name} is a compiled set: --config {CONFIG} trains it as it is (packing and "
            f"assistant mask off, padding-free on); here {', '.join(wrong)}"
        )


def check_compiled_for(
    script_args: ScriptArguments, training_args: SFTConfig, tokenizer: PreTrainedTokenizerBase, allow: list[str]
) -> None:
    """Raise UsageError for a set of another tokenizer, template or special tokens, by the set's report.json.

    Ids mean nothing to another tokenizer, and labels are those of the template.
    """
    report_path = Path(script_args.dataset_name) / "report.json"
    if "other_tokenizer" in allow or not report_path.is_file():
        return
    report = json.loads(report_path.read_text(encoding="utf-8"))
    if report.get("script") != "compile.py":
        return
    compiled_for = {
        "tokenizer": report.get("tokenizer"),
        "template": report.get("template"),
        "special tokens": report.get("kwargs", {}).get("special_tokens"),
    }
    current = describe_tokenizer(training_args, tokenizer)
    different = [name for name in current if current[name] != compiled_for[name]]
    if different:
        raise UsageError(
            f"{script_args.dataset_name}: compiled with another {' and '.join(different)} than this recipe's: compile "
            "it anew (python -m data_prep.compile), or --allow other_tokenizer"
        )


def describe_tokenizer(training_args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Return what tokens depend on beside the rows, with hashes as report.json has them (data_prep/compile.py)."""
    if training_args.eos_token is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = training_args.eos_token
    template = tokenizer.chat_template or ""
    if training_args.chat_template_path is not None:
        template = Path(training_args.chat_template_path).read_text(encoding="utf-8")
    return {
        "tokenizer": hash_tokenizer(tokenizer),
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "special tokens": tokenizer.special_tokens_map,
    }
