"""The README is true: every file it names exists, every command in it parses, every config names a real launch."""

import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.helpers.runs import REPO, parse

README = (REPO / "README.md").read_text()
CONFIGS = sorted((REPO / "accelerate_configs").glob("*.yaml"))
DATA = (REPO / "data_prep" / "README.md").read_text()
MIXES = "\n".join(path.read_text().replace("#   ", "    ") for path in sorted((REPO / "data_prep" / "mixes").glob("*")))
PAGES = "".join((REPO / name).read_text() for name in ("recipes/README.md", "eval/README.md", "eval/SERVING.md"))
TEXTS = re.sub(r" \\\n *", " ", "\n".join((README, DATA, MIXES, PAGES)))
COPIES = {copy: recipe for recipe, copy in re.findall(r"^    cp (\S+\.py) (\S+)$", TEXTS, re.M)}
COMMANDS = sorted(set(re.findall(r"^    ((?:accelerate|python|make) .*?)(?:  #.*)?$", TEXTS, re.M)))


def check(command, monkeypatch):
    words = shlex.split(command)
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=REPO, capture_output=True)
        assert done.returncode == 0
    elif words[0] == "accelerate":
        words = words[2:]
        if words[0] == "--config_file":
            assert (REPO / words[1]).is_file()
            words = words[2:]
        monkeypatch.chdir(REPO)
        parse(REPO / COPIES.get(words[0], words[0]), *words[1:])
    elif words[2] == "eval.sweep":
        monkeypatch.chdir(REPO)
        parse(REPO / words[3], *take_recipe_flags(words[4:]))
    elif not words[1].startswith("llama.cpp/"):  # a script of its own
        flags = [word for word in words[2:] if word.startswith("--")]
        assert len(words) > 2 and all(re.search(rf"{flag}\b", usage(*words[1:3])) for flag in flags)


def take_recipe_flags(words):
    """Return the flags, with their values, that eval.sweep hands on to its recipe."""
    taken = []
    is_taken = False
    for word in words:
        if word.startswith("--"):
            is_taken = not re.search(rf"{word}\b", usage("-m", "eval.sweep"))
        if is_taken:
            taken.append(word)
    return taken


@cache
def usage(*words):
    """The help of `python WORDS`: a file, or -m and a module."""
    names = words[:2] if words[0] == "-m" else words[:1]
    command = [sys.executable, *names, "--help"]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, monkeypatch):
    check(command, monkeypatch)


def test_it_found_the_commands():
    kinds = {command.split()[0] for command in COMMANDS}
    assert kinds == {"accelerate", "python", "make"} and len(COMMANDS) >= 5


def test_it_is_short():
    assert len(README.splitlines()) <= 130


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert len(links) > 20 and [link for link in links if not (REPO / link).exists()] == []


@pytest.mark.parametrize("folder", ["recipes", "recipes/hooks", "data_prep", "eval"])
def test_every_file_of_a_folder_is_named_in_its_readme(folder):
    text = (REPO / folder / "README.md").read_text()
    names = [path.stem for path in (REPO / folder).glob("[a-z]*.py")]
    assert names and [name for name in names if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs(path):
    """accelerate's own loader takes them (it refuses unknown keys), and they hold topology only."""
    head = path.read_text().splitlines()
    assert head[0].startswith("#") and f"accelerate launch --config_file accelerate_configs/{path.name}" in head[1]
    settings = yaml.safe_load(path.read_text())
    load_config_from_file(str(path))
    assert not {"mixed_precision", "gradient_accumulation_steps", "dynamo_config"} & settings.keys()


def test_no_unfinished_marks():
    assert len(CONFIGS) >= 3
    assert not re.search(r"DEMO_|TRL_RATIO|TODO", README)


@pytest.mark.long
def test_demo_in_a_fresh_clone_with_a_space(tmp_path):
    """As a new user: clone into a path with a space, `make demo` twice; the second run installs nothing, same table."""
    clone = tmp_path / "a new clone"
    subprocess.run(["git", "clone", "--quiet", REPO, clone], check=True)
    tables = []
    for _ in range(2):
        done = subprocess.run(["make", "demo"], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("pip install" in done.stdout) is (not tables)
        tables.append((clone / "runs" / "demo" / "qlora" / "report.json").read_bytes())
    assert tables[0] == tables[1]
