"""chat_templates/NEW_FAMILY.md: the family that the page adds, made of its own blocks, passes the proofs."""

import re

import pytest

import tests.templates.test_chat_templates as proofs
from data_prep.common.answer_formats import FORMATS, HERMES
from tests.helpers import template_oracle
from tests.helpers.runs import REPO

PAGE = (REPO / "chat_templates" / "NEW_FAMILY.md").read_text(encoding="utf-8")
LOOP = "{%- for message in messages %}\n    {%- set content = "


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def page_template() -> str:
    """Return the template that the page describes."""
    comment, system = blocks("jinja")
    source = proofs.template("qwen3_instruct_2507")
    assert source.count(LOOP) == 1
    return source.replace(source[: source.index("-#}") + 4], comment).replace(LOOP, system + LOOP)


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> template_oracle.Family:
    names = dict(vars(template_oracle))
    exec(blocks("python")[0], names)
    text = page_template()
    monkeypatch.setattr(proofs, "template", lambda name: text)
    return names["ACME_1"]


def test_the_page_names_the_places():
    assert '`"acme_1": HERMES,`' in PAGE and FORMATS["qwen3_instruct_2507"] is HERMES
    for path in re.findall(r"`((?:tests|data_prep|chat_templates)/[\w./]+?)`", PAGE):
        assert "acme_1" in path or (REPO / path).exists(), path


def test_its_family_is_proven(acme):
    proofs.test_a_rendering_marked_by_hand(acme)
    proofs.test_twenty_turns(acme)
    proofs.test_random_conversations(acme)
    proofs.test_serving_form_renders_the_same(acme)


def test_a_forgotten_system_turn_is_found_out(acme, monkeypatch):
    text = page_template().replace(blocks("jinja")[1], "")
    monkeypatch.setattr(proofs, "template", lambda name: text)
    with pytest.raises(AssertionError):
        proofs.test_a_rendering_marked_by_hand(acme)
