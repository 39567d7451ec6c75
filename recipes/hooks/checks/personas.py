"""Personas that the template drops: a bug that lost every system message of SmolLM3's training changed no score."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datasets import Dataset

from data_prep.common.personas import LostPersonas
from data_prep.common.rendering import Renderer

from ..messages import UsageError
from .template import read_training_template

if TYPE_CHECKING:
    from ..trainer import SFTTrainer

COLUMNS = ("messages", "prompt", "tools", "chat_template_kwargs")
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class LostPersona:
    row: int  # from 0
    text: str


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
            "(python -m data_prep.check names them all) or pass another --chat_template_path; --allow lost_personas "
            "trains them so"
        )


def find_lost_personas(trainer: "SFTTrainer", rows: Dataset) -> list[LostPersona]:
    """Return the rows with a persona that the rendered text leaves out; most sets have few personas."""
    names = [name for name in COLUMNS if name in rows.column_names]
    if not {"messages", "prompt"} & set(names):
        return []
    lost_personas = LostPersonas(Renderer(read_training_template(trainer), trainer.processing_class))
    lost = []
    for number, row in enumerate(rows.select_columns(names)):
        persona = lost_personas.find(row)
        if persona is not None:
            lost.append(LostPersona(number, persona.text))
    return lost
