"""Personas that the template drops: a bug that lost every system message of SmolLM3's training changed no score."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset
from jinja2 import TemplateError

from ..messages import UsageError
from .template import read_training_template

if TYPE_CHECKING:
    from ..trainer import SFTTrainer

PERSONA_ARGUMENTS = ("custom_instructions", "system_prompt", "model_identity")  # of templates: who speaks
PERSONA_ROLES = ("system", "developer")
SWITCHES = re.compile(r"/(?:no_think|think|system_override)\b")  # templates take them out of a persona
COLUMNS = ("messages", "prompt", "tools", "chat_template_kwargs")
SHOWN_CHARACTERS = 60
MARK = "personamark"


@dataclass(frozen=True)
class LostPersona:
    row: int  # from 0
    text: str


@dataclass(frozen=True)
class Conversation:
    """What a template renders of a row."""

    turns: list[dict]
    template_kwargs: dict
    tools: list[dict] | None

    def persona_turns(self) -> list[int]:
        """Return the positions of the turns that say who speaks."""
        positions = []
        for position, turn in enumerate(self.turns):
            if turn["role"] in PERSONA_ROLES and is_persona(turn.get("content")):
                positions.append(position)
        return positions

    def persona_arguments(self) -> list[str]:
        """Return the names of the template's arguments that say who speaks."""
        return [name for name in PERSONA_ARGUMENTS if is_persona(self.template_kwargs.get(name))]

    def personas(self) -> list[str]:
        """Return the texts that say who speaks: of turns, then of arguments."""
        texts = [self.turns[position]["content"] for position in self.persona_turns()]
        texts += [self.template_kwargs[name] for name in self.persona_arguments()]
        return texts

    def with_marks(self) -> "Conversation":
        """Return the conversation with a mark behind each persona."""
        turns = list(self.turns)
        for position in self.persona_turns():
            turns[position] = turns[position] | {"content": f"{turns[position]['content']} {MARK}"}
        template_kwargs = dict(self.template_kwargs)
        for name in self.persona_arguments():
            template_kwargs[name] = f"{template_kwargs[name]} {MARK}"
        return Conversation(turns, template_kwargs, self.tools)

    def persona_key(self) -> str:
        """Return equal texts for conversations whose personas a template treats alike; most sets have few."""
        parts = [self.personas(), self.turns[0]["role"], bool(self.tools), self.template_kwargs]
        return json.dumps(parts, sort_keys=True, default=str)


def is_persona(value: object) -> bool:
    """Return whether a value is text that is not blank, as data_prep/check.py sees a persona."""
    return isinstance(value, str) and bool(value.strip())


def check_personas(trainer: "SFTTrainer", allow: list[str]) -> None:
    """Raise UsageError where rows lose their persona in the text that is trained."""
    rows = trainer.train_rows
    if "lost_personas" in allow or "input_ids" in rows.column_names:
        return
    lost = find_lost_personas(trainer, rows)
    if lost:
        raise UsageError(
            f"{len(lost):,} of {len(rows):,} rows lose their persona, the first is row {lost[0].row} from 0: "
            f"{lost[0].text[:SHOWN_CHARACTERS]!r} is not in the text that the template renders: mend the rows "
            "(python -m data_prep.check names them all) or pass another --chat_template_path; --allow lost_personas trains "
            "them so"
        )


def find_lost_personas(trainer: "SFTTrainer", rows: Dataset) -> list[LostPersona]:
    """Return the rows with a persona that the rendered text leaves out.

    Each persona is rendered with a mark behind it, as data_prep/check.py does: its text alone might stand in the
    template's own persona, or in what the user says.
    """
    lost = []
    missing_by_key: dict[str, str | None] = {}
    for number, conversation in read_conversations(rows):
        if not conversation.personas():
            continue
        key = conversation.persona_key()
        if key not in missing_by_key:
            missing_by_key[key] = find_missing_persona(trainer, conversation)
        if missing_by_key[key] is not None:
            lost.append(LostPersona(number, missing_by_key[key]))
    return lost


def read_conversations(rows: Dataset) -> Iterator[tuple[int, Conversation]]:
    """Yield (position, conversation) of the rows that hold one."""
    names = [name for name in COLUMNS if name in rows.column_names]
    if not {"messages", "prompt"} & set(names):
        return
    for number, row in enumerate(rows.select_columns(names)):
        turns = row.get("messages") or row.get("prompt")
        if not isinstance(turns, list):
            continue
        tools = row.get("tools")
        if isinstance(tools, str):
            tools = json.loads(tools)
        yield number, Conversation(turns, row.get("chat_template_kwargs") or {}, tools)


def find_missing_persona(trainer: "SFTTrainer", conversation: Conversation) -> str | None:
    """Return the first persona that the rendered text leaves out, or None."""
    marked = conversation.with_marks()
    try:
        text = render(trainer, marked)
    except TemplateError:  # the row itself renders, or it would not be here: it is looked at as it stands
        marked = conversation
        text = render(trainer, conversation)
    for expected, persona in zip(marked.personas(), conversation.personas(), strict=True):
        if normalized_text(expected) not in text:
            return persona
    return None


def render(trainer: "SFTTrainer", conversation: Conversation) -> str:
    """Return the normalized text of a conversation in the training template."""
    turns = []
    for turn in conversation.turns:
        turns.append({key: value for key, value in turn.items() if value is not None})
    text = trainer.processing_class.apply_chat_template(
        turns,
        chat_template=read_training_template(trainer),
        tools=conversation.tools,
        tokenize=False,
        **conversation.template_kwargs,
    )
    return normalized_text(text)


def normalized_text(text: str) -> str:
    """Return text without the switches that a template takes out of a persona and without a difference of blanks."""
    return " ".join(SWITCHES.sub(" ", text).split())
