"""transformers 4 prepares the same rows: ids and assistant masks of three families equal those of transformers 5.

StepFun publishes its data for `transformers<5.0`. The newest 4.x is installed next to ours, and one script renders the
same random conversations in both: compared is the whole of each library's apply_chat_template, with its own renderer,
its release of tokenizers and its way from characters to tokens.

What would fool this test, and what stands against it:
- both sides are the same library: each reports its versions;
- nothing is compared (all refused, nothing trained, no tools, no reasoning): what was seen is counted and asserted;
- a failure on both sides passes for equality: a refusal counts only with a sentence that names a message.
"""

import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings

from tests.helpers.runs import REPO, SHARED
from tests.templates.test_chat_templates import ALL_FAMILIES, conversations, template, tokenizer_of

pytestmark = pytest.mark.long
PACKAGES = ["transformers==4.57.6", "tokenizers==0.22.2", "jinja2==3.1.6"]  # the newest 4.x, and what it renders with
CONVERSATIONS = 400
SCRIPT = """
import json, sys
import tokenizers, transformers

folder, source, rows = sys.argv[1:]
# not AutoTokenizer: 4.x does not know TokenizersBackend, the class that 5.x writes into tokenizer_config.json
tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
template, found = open(source, encoding="utf-8").read(), []
for messages, tools, arguments in json.load(open(rows, encoding="utf-8")):
    try:
        row = tokenizer.apply_chat_template(
            messages, tools=tools or None, chat_template=template, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True, **arguments)
        found.append([row["input_ids"], row["assistant_masks"]])
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
json.dump([transformers.__version__, tokenizers.__version__, found], sys.stdout)
"""


@pytest.fixture(scope="module")
def python4():
    """The interpreter of an environment with transformers 4 and no torch, kept in runs/ for the next time."""
    folder = REPO / "runs" / PACKAGES[0].replace("==", "-")
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = f"{sys.version} {sys.base_prefix} {PACKAGES}"
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--retries", "1", *PACKAGES], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {' '.join(PACKAGES)}: {done.stderr.strip().splitlines()[-1]}")
        stamp.write_text(wanted)
    return python


def drawn(family):
    found = []

    @settings(
        max_examples=CONVERSATIONS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(conversations(family))
    def run(conversation):
        found.append(conversation)

    run()
    return found


@pytest.mark.parametrize("name", ["step3_5", "step3_qwen3", "qwen3"])
def test_ids_and_masks_equal_those_of_transformers_4(name, python4, tmp_path):
    family, seen, sides = next(family for family in ALL_FAMILIES if family.name == name), Counter(), []
    tokenizer = SHARED / "tokenizers" / (family.tokenizer or "none")
    if not tokenizer.is_dir():
        tokenizer = tmp_path / "tokenizer"
        tokenizer_of(family, "small").save_pretrained(tokenizer)
    rows, source, said = drawn(family), tmp_path / "source.jinja", tmp_path / "rows.json"
    source.write_text(template(name), encoding="utf-8")
    said.write_text(json.dumps(rows))
    for python in (sys.executable, python4):
        command = [python, "-I", "-c", SCRIPT, tokenizer, source, said]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        sides.append(json.loads(done.stdout))
    (*ours, five), (*theirs, four) = sides
    assert ours == [transformers.__version__, tokenizers.__version__] and ours[0].startswith("5.")
    assert [f"transformers=={theirs[0]}", f"tokenizers=={theirs[1]}"] == PACKAGES[:2]
    for (messages, tools, arguments), new, old in zip(rows, five, four, strict=True):
        assert new == old, (messages, tools, arguments)
        if isinstance(new, str):
            assert re.match(r"TemplateError: message \d+: ", new), new
            seen["refused"] += 1
            continue
        seen["compared"] += 1
        seen["trained tokens"] += sum(new[1])
        seen["context tokens"] += len(new[1]) - sum(new[1])
        if any(new[1]):
            seen["tools"] += any(message.get("tool_calls") for message in messages)
            seen["reasoning"] += any(message.get("reasoning_content") for message in messages)
            seen[str(arguments.get("train_turns"))] += 1
    assert seen["compared"] >= 300 and min(seen["trained tokens"], seen["context tokens"]) > 10_000, seen
    assert all(seen[what] >= 20 for what in ("tools", "reasoning", "None", "all", "last", "flagged")), seen
