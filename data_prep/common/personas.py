"""Personas: texts of a row that say who speaks, and those that a template leaves out of what is trained."""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .errors import InvalidRow
from .rows import get_tools, get_turns

if TYPE_CHECKING:
    from .rendering import Renderer

PERSONA_ARGUMENTS = ("custom_instructions", "system_prompt", "model_identity")  # of templates: who speaks
PERSONA_ROLES = ("system", "developer")
PERSONA_LOST = "persona lost"  # the reason, in every report
SWITCHES = re.compile(r"/(?:no_think|think|system_override)\b")  # templates take them out of a persona


class Persona(NamedTuple):
    """A text that says who speaks. place: message 0, or the name of a template's argument."""

    place: str
    text: str


def find_personas(row: dict) -> list[Persona]:
    """Return the texts of a row that say who speaks, blank ones not: arguments of the template, then messages."""
    template_kwargs = row.get("chat_template_kwargs") or {}
    texts = {name: template_kwargs.get(name) for name in PERSONA_ARGUMENTS}
    for number, turn in enumerate(get_turns(row)):
        if turn.get("role") in PERSONA_ROLES:
            texts[f"message {number}"] = turn.get("content")
    return [Persona(place, text) for place, text in texts.items() if isinstance(text, str) and text.strip()]


def find_lost_personas(row: dict, renderer: "Renderer") -> Iterator[Persona]:
    """Yield each persona that the rendered text leaves out, as SmolLM3's own did for custom_instructions=None.

    Each is rendered with a mark behind it: its text alone might stand in the default persona, or in what the user says,
    and the row would pass though the template drops it. Where the template does not take the marks, the row is looked
    at as it stands; where it does not render at all, nothing is yielded.
    """
    personas = find_personas(row)
    if not personas:
        return
    marked = [Persona(place, f"{text} persona{number}mark") for number, (place, text) in enumerate(personas)]
    for shown in (marked, personas):
        try:
            text = render_with_personas(row, renderer, shown)
        except InvalidRow:
            continue
        for persona, expected in zip(personas, shown, strict=True):
            if normalize_persona(expected.text) not in text:
                yield persona
        return


def render_with_personas(row: dict, renderer: "Renderer", personas: list[Persona]) -> str:
    """Return the normalized text of a row with these personas in their places. Raises InvalidRow."""
    texts = dict(personas)
    template_kwargs = dict(row.get("chat_template_kwargs") or {})
    for name in PERSONA_ARGUMENTS:
        if name in texts:
            template_kwargs[name] = texts[name]
    turns = []
    for number, turn in enumerate(get_turns(row)):
        turns.append({**turn, "content": texts.get(f"message {number}", turn.get("content"))})
    shown = {**row, "chat_template_kwargs": template_kwargs}
    return normalize_persona(renderer.render_unchecked(shown, turns).text)


def normalize_persona(text: str) -> str:
    """Return text without the switches that a template takes out of a persona and without a difference of blanks."""
    return " ".join(SWITCHES.sub(" ", text).split())


class LostPersonas:
    """Finds the rows whose personas a template leaves out; rows that it treats alike are rendered once."""

    def __init__(self, renderer: "Renderer") -> None:
        self.renderer = renderer
        self.first_lost: dict[str, Persona | None] = {}

    def find(self, row: dict) -> Persona | None:
        """Return the first persona of a row that the rendered text leaves out, or None; most rows have none."""
        personas = find_personas(row)
        if not personas:
            return None
        key = persona_key(row, personas)
        if key not in self.first_lost:
            self.first_lost[key] = next(find_lost_personas(row, self.renderer), None)
        return self.first_lost[key]


def persona_key(row: dict, personas: list[Persona]) -> str:
    """Return equal texts for rows whose personas a template treats alike."""
    texts = [persona.text for persona in personas]
    parts = [texts, get_turns(row)[0]["role"], bool(get_tools(row)), row.get("chat_template_kwargs")]
    return json.dumps(parts, sort_keys=True, default=str)
