"""The pages of docs/, AGENTS.md, CONTRIBUTING.md and the workflow are true to the code.

What they link to or name exists, every command in them parses, every message that docs/errors.md quotes stands in the
code, and what a user can allow, or a check of rows can find, stands on that page.

Breaks tried, each seen red: a link to no file; a backticked file, folder and pattern of none; a command with a
misspelt flag, of a recipe that is not there, with a flag that no recipe has behind `eval.fit`, a make target of none; a
word of a message changed, twice; an `--allow` name misspelt, one left out, one of none on another page; a reason of
check changed, one left out; the one message of a file of checks left out; a workflow with a target of none, and with
another Python.
"""

import ast
import re
import shlex
from functools import cache

import pytest
import yaml
from hooks.checks import ALLOWED

from tests.docs.test_readme import COMMANDS as PARSED_THERE
from tests.docs.test_readme import check, usage
from tests.helpers.runs import REPO, parse

PAGES = sorted((REPO / "docs").glob("*.md")) + [REPO / "AGENTS.md", REPO / "CONTRIBUTING.md"]
ERRORS = (REPO / "docs" / "errors.md").read_text(encoding="utf-8")
MADE = ("runs/", "data/", "models/", "exports/", "llama.cpp/", "wandb/", ".venv/")  # by users and by commands
WRITTEN = {  # files that commands write, or that models bring
    *("adapter_config.json", "config.json", "config.yaml", "export_report.json", "log.jsonl", "loss.png"),
    *("machine.json", "mine.Q4_K_M.gguf", "mine.Q8_0.gguf", "rejected.jsonl", "report.json", "run.json"),
    *("versions.json",),
}
FILE = re.compile(r"[\w./*-]+\.(?:py|md|yaml|yml|jinja|txt|sh|sbatch|json|jsonl|png|gguf)|[\w./-]+/")
COMMAND = re.compile(r"^    ((?:[A-Z_0-9]+=\S+ )*)((?:accelerate|python|make) .*?)(?:  #.*)?$", re.M)
OF_RECIPES = ("eval.fit", "eval.sweep")  # commands whose other flags are those of the recipe that they are given
CODE = ("recipes", "data_prep", "eval")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


# -- files ------------------------------------------------------------------------------------------------------------
@each_page
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@each_page
def test_named_files(page):
    """A name with a folder is a path from the repository's root; a bare one is that of some file in it."""
    for quoted in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        word = quoted.split()[0]
        if not FILE.fullmatch(word) or word.startswith(MADE) or word in WRITTEN or "NAME" in word:
            continue
        pattern = word.rstrip("/")
        found = list(REPO.glob(pattern))
        if "/" not in pattern:
            found += [path for folder in (*CODE, "tests", "accelerate_configs") for path in (REPO / folder).rglob(word)]
        assert found, word


# -- commands ---------------------------------------------------------------------------------------------------------
def read_commands():
    commands = set()
    for page in PAGES:
        text = re.sub(r" \\\n *", " ", page.read_text(encoding="utf-8"))
        commands.update(command for _, command in COMMAND.findall(text))
    return sorted(commands)


COMMANDS = read_commands()


def without_own_flags(module, words):
    """Return the words that go to the recipe: all but the flags that the command's own help lists, and their values."""
    own = set(re.findall(r"^  (--\w+)", usage("-m", module), re.M))
    kept = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word in own
        if not skipping:
            kept.append(word)
    return kept


def read_flags(command):
    """(module, flags) of a `python -m` command."""
    words = shlex.split(command)
    return words[2], {word for word in words if word.startswith("--")}


def is_parsed_there(command):
    """Whether test_readme.py holds the same module to the same flags or more: its help takes seconds."""
    if not command.startswith("python -m"):
        return False
    module, flags = read_flags(command)
    others = [read_flags(other) for other in PARSED_THERE if other.startswith("python -m")]
    return flags <= set().union(*[names for name, names in others if name == module]) and module in dict(others)


@pytest.mark.parametrize("command", [command for command in COMMANDS if not is_parsed_there(command)])
def test_commands(command, monkeypatch):
    command = re.sub(r" --num_processes \d+(?= recipes/)", "", command)  # the launcher's own
    words = shlex.split(command)
    if words[0] == "python" and words[2] in OF_RECIPES:
        recipe, *flags = without_own_flags(words[2], words[3:])
        monkeypatch.chdir(REPO)
        parse(REPO / recipe, *flags)
    else:
        check(command, monkeypatch)


def test_it_found_the_commands():
    assert {command.split()[0] for command in COMMANDS} == {"accelerate", "python", "make"} and len(COMMANDS) > 30


# -- messages ---------------------------------------------------------------------------------------------------------
def read_text(node):
    """Return the text of a string in the code, with "…" for each value that is put in."""
    if isinstance(node, ast.Constant):
        return node.value
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(part.value)
        else:
            parts.append("…")
    return "".join(parts)


@cache
def read_strings():
    """(file, string) for every string of the code, whole: those that stand side by side are one in the syntax tree."""
    strings = []
    for folder in CODE:
        for path in (REPO / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
            for node in ast.walk(tree):
                is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
                if (is_text and id(node) not in inner) or isinstance(node, ast.JoinedStr):
                    strings.append((path, read_text(node)))
    return strings


def quoted_messages():
    """What stands in backticks in the first column of the tables."""
    messages = []
    for line in ERRORS.splitlines():
        if line.startswith("| `"):
            messages += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return messages


def find_files(message):
    """The files of the code with a string that holds the message, "…" for anything."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.S)
    return {path for path, text in read_strings() if pattern.search(text)}


@pytest.mark.parametrize("message", quoted_messages())
def test_messages_stand_in_the_code(message):
    assert find_files(message)


def test_every_file_of_checks_has_its_place():
    """A file that refuses runs has a message on the page at least."""
    quoted = set().union(*map(find_files, quoted_messages()))
    for path in (REPO / "recipes" / "hooks" / "checks").glob("*.py"):
        assert "raise UsageError(" not in path.read_text(encoding="utf-8") or path in quoted, path


def test_it_found_the_messages():
    messages = quoted_messages()
    assert len(messages) > 100 and all(len(message.replace("…", "").strip()) > 7 for message in messages)


def test_allowed_names():
    """Each name that a check gives stands in errors.md, and no page tells of another."""
    named = set(re.findall(r"--allow (\w+)", ERRORS))
    assert named == set(ALLOWED)
    for page in PAGES:
        assert set(re.findall(r"--allow ([a-z]\w+)", page.read_text(encoding="utf-8"))) <= named, page


def test_reasons_of_check():
    """Every reason that check gives by itself stands on the page: in Fault(...), or in InvalidRow(...) of rows.py."""
    reasons = set()
    for name in ("check.py", "common/rows.py", "common/personas.py"):
        source = (REPO / "data_prep" / name).read_text(encoding="utf-8")
        reasons.update(re.findall(r'(?:Fault|InvalidRow)\("([^"]+)"', source))
        reasons.update(
            re.findall(r'^(?:UNTRAINED|CHANGED|MOJIBAKE|\w+_NEWLINE|PERSONA_LOST) = "([^"]+)"', source, re.M)
        )
    assert len(reasons) > 25 and reasons <= set(quoted_messages())


# -- the workflow -----------------------------------------------------------------------------------------------------
def test_workflow_calls_what_the_makefile_has(monkeypatch):
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    commands = []
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "run" in step:
                commands.append(step["run"])
            assert step.get("with", {}).get("python-version", "3.11") == "3.11"
    assert {shlex.split(command)[1] for command in commands} == {"lint", "test"}
    for command in commands:
        check(command, monkeypatch)
