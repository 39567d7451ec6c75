"""Library messages of the commands of eval/: those named in data_prep/common/quiet.py are left out, all others show.

Breaks tried, each seen red: silence() left out, a name that no library has, any message of a logger left out.
"""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import transformers
from peft import LoraConfig, get_peft_model

from data_prep.common.quiet import LOGGED, WARNINGS, silence
from tests.eval.test_compare import make_model, save, write_rows
from tests.helpers.runs import MODULES

SOURCES = {
    "`is_gradient_checkpointing` is deprecated": "transformers/modeling_utils.py",
    "Failed to load CPU gemm_4bit_forward": "bitsandbytes/backends/cpu/ops.py",
    "Setting accelerator to CPU.": "deepspeed/accelerator/real_accelerator.py",
}


def test_every_name_is_one_that_the_pinned_libraries_use():
    """An update that drops a message drops its name here."""
    libraries = Path(transformers.__file__).parents[1]
    assert SOURCES.keys() == {*WARNINGS, *[words for beginnings in LOGGED.values() for words in beginnings]}
    for words, path in SOURCES.items():
        assert words in (libraries / path).read_text(), words


def test_only_the_beginning_of_a_message_counts(caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will go", FutureWarning, stacklevel=1)
        warnings.warn("I say: `is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message)[:5] for warning in caught] == ["I say"]
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from a place")
    logger.warning("something new")
    assert [record.getMessage() for record in caplog.records] == ["something new"]


def test_a_command_on_an_adapter_says_nothing_but_its_own(tmp_path):
    save(tmp_path / "base", make_model(0))
    lora = get_peft_model(make_model(0), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    lora.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save(tmp_path / "adapter", lora)
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Half of eight?", "answer": "#### 4"}])
    words = [sys.executable, "-m", "eval.chat_eval", tmp_path / "adapter", "--task", f"gsm8k={rows}"]
    environment = {name: value for name, value in MODULES.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run([*words, "--max_new_tokens", "4"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_messages_are_left_out_before_any_library_is_imported():
    code = "import logging, sys, eval; names = {'transformers', 'bitsandbytes', 'peft', 'torch'} & set(sys.modules); "
    code += "print(names, len(logging.getLogger('bitsandbytes.backends.cpu.ops').filters))"
    done = subprocess.run([sys.executable, "-c", code], env=MODULES, capture_output=True, text=True, check=True)
    assert done.stdout == "set() 1\n"
