"""The published shapes that data_prep.normalize reads, one function each and one table, SOURCES.

A function takes a raw row (dict) and returns {"messages": [...]} and what else the row has: tools, source, tags, lang,
chat_template_kwargs, id, and not_kept, names of what it left out. A field that is missing raises KeyError, a value of
another type TypeError or AttributeError, a row that cannot be used InvalidRow; normalize counts them. What stands after
* in a function's arguments is a flag of normalize. A new source = one function and one line in SOURCES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .chats import (
    TURN_COLUMNS,
    TURNS,
    blossom,
    conversation_pairs,
    holds_lists,
    holds_loss_masks,
    holds_metadata,
    holds_pairs,
    holds_persona,
    holds_speakers,
    holds_strings,
    holds_thoughts,
    holds_tree,
    holds_turns,
    list_of_strings,
    message_tree,
    messages,
    openthoughts,
    sharegpt,
    smoltalk,
    smoltalk2,
    step35,
    turn_lists,
)
from .dialogs import OPTIONS, corecode, holds_segments, holds_utterances, kdconv, lccc, mutual
from .exchange import KEPT, SYSTEM, THOUGHTS
from .exercises import (
    arc,
    cmath,
    gsm8k,
    holds_body,
    holds_choices,
    holds_index,
    holds_places,
    holds_working,
    mawps,
    mmlu,
    svamp,
)
from .fields import fields
from .instructions import (
    alpaca,
    dolly,
    holds_placeholder,
    identity,
    nemotron,
    prompt_completion,
    query_response,
    s1k,
)
from .preference import emoji_preference, preference
from .spelling import simple_spelling, spelling, spelling_bee
from .tools import bfcl, hermes, holds_tags, xlam
from .vendors import GEMINI_SYSTEM, chatglm3, gemini, holds_contents, holds_moss, holds_observation, moss


@dataclass(frozen=True)
class Source:
    """A published shape."""

    convert: Callable[..., dict]
    needs: str = ""  # the columns by which its rows are known; a|b: either
    reads: str = ""  # other columns that it reads
    language: str | None = None  # of its rows; None: told by their script
    fits: Callable[[dict], bool] | None = None  # whether a row that has the columns is of this shape
    sign: str = ""  # what fits sees beside the columns, in words
    extends: str = ""  # sources whose rows it reads as well
    turn_keys: str = ""  # that it reads of a turn, beside those of any message
    is_guessed: bool = True  # whether auto may choose it
    is_made: bool = False  # of no input

    @cached_property
    def needed(self) -> list[list[str]]:
        return [need.split("|") for need in self.needs.split()]

    @cached_property
    def columns(self) -> frozenset[str]:
        """All that it reads of a row; the id is read of every row."""
        names = {"id", *self.reads.split()}
        for need in self.needed:
            names.update(need)
        return frozenset(names)

    def has_columns(self, columns: set[str]) -> bool:
        return all([not columns.isdisjoint(need) for need in self.needed])


CHAT = f"{' '.join(TURN_COLUMNS)} {SYSTEM} {KEPT}"  # of a conversation
PAIR = f"{SYSTEM} {THOUGHTS} history {KEPT}"  # beside a question and an answer
SOURCES = {
    "messages": Source(messages, TURNS, CHAT, fits=holds_turns),
    "sharegpt": Source(sharegpt, "conversations", CHAT, fits=holds_speakers),
    "hermes": Source(
        hermes, TURNS, CHAT, fits=holds_tags, sign="calls or tools as tags in the text", extends="messages sharegpt"
    ),
    "chatglm3": Source(
        chatglm3,
        TURNS,
        CHAT,
        fits=holds_observation,
        sign="calls with their observation",
        extends="messages",
        turn_keys="parameters observation",
    ),
    "conversation_pairs": Source(conversation_pairs, TURNS, CHAT, fits=holds_pairs),
    "list_of_strings": Source(list_of_strings, TURNS, CHAT, fits=holds_strings, sign="strings as turns"),
    "turn_lists": Source(turn_lists, "input output", f"{SYSTEM} {KEPT}", fits=holds_lists, sign="lists of strings"),
    "message_tree": Source(message_tree, "prompt|replies", "text role lang message_tree_id", fits=holds_tree),
    "moss": Source(moss, "chat", f"meta_instruction {SYSTEM} {KEPT}", fits=holds_moss),
    "gemini": Source(
        gemini, "contents", f"{' '.join(GEMINI_SYSTEM)} {SYSTEM} {KEPT}", fits=holds_contents, turn_keys="parts"
    ),
    "alpaca": Source(alpaca, "instruction output", f"input {PAIR}"),
    "dolly": Source(dolly, "instruction response", f"context {PAIR}"),
    "query_response": Source(query_response, "query|question response", PAIR),
    "prompt_completion": Source(prompt_completion, "prompt completion", PAIR),
    "fields": Source(fields, is_guessed=False),
    "step35": Source(step35, "conversations", CHAT, fits=holds_loss_masks),
    "blossom": Source(blossom, "messages metadata id", CHAT, fits=holds_metadata),
    "smoltalk": Source(smoltalk, "messages", CHAT, is_guessed=False),
    "smoltalk2": Source(
        smoltalk2, "messages chat_template_kwargs", CHAT, fits=holds_persona, sign="custom_instructions in them"
    ),
    "nemotron": Source(nemotron, "input output generator reasoning", f"category {SYSTEM}"),
    "openthoughts": Source(
        openthoughts,
        "conversations",
        CHAT,
        fits=holds_thoughts,
        sign="<|begin_of_thought|> in the text",
        extends="sharegpt",
    ),
    "s1k": Source(
        s1k,
        "question deepseek_attempt|gemini_attempt|attempt",
        "deepseek_thinking_trajectory gemini_thinking_trajectory thinking_trajectories",
    ),
    "identity": Source(
        identity,
        "instruction output",
        f"messages input {PAIR}",
        fits=holds_placeholder,
        sign="{{name}} in the answers",
        extends="alpaca",
    ),
    "preference": Source(
        preference,
        "chosen|chosen_messages|chosen_response|preferred_output|response_j",
        f"input prompt question query instruction conversations messages history {SYSTEM} {KEPT}",
    ),
    "emoji_preference": Source(
        emoji_preference, "chosen|answer_zh|answer_en", "prompt question conversations", is_guessed=False
    ),
    "gsm8k": Source(gsm8k, "question answer", language="en", fits=holds_working, sign="#### in the answers"),
    "cmath": Source(cmath, "input|question golden", language="zh"),
    "mawps": Source(
        mawps, "Question Numbers Answer", "Equation", language="en", fits=holds_places, sign="N_00 in the questions"
    ),
    "svamp": Source(svamp, "Body|body Question|question Answer|answer", "ID idx", language="en", fits=holds_body),
    "arc": Source(arc, "question choices answerKey", language="en", fits=holds_choices),
    "mmlu": Source(mmlu, "choices|train", "question subject answer", language="en", fits=holds_index),
    "kdconv": Source(kdconv, "messages", fits=holds_utterances, language="zh", turn_keys="message"),
    "lccc": Source(
        lccc, TURNS, language="zh", fits=holds_segments, sign="blanks between Chinese words", extends="list_of_strings"
    ),
    "corecode": Source(corecode, "dialogue question answer", " ".join(OPTIONS), language="zh"),
    "mutual": Source(mutual, "article options", "answers", language="en"),
    "simple_spelling": Source(
        simple_spelling, reads="number split seed", language="en", is_guessed=False, is_made=True
    ),
    "spelling_bee": Source(spelling_bee, reads="number split seed", language="en", is_guessed=False, is_made=True),
    "spelling": Source(spelling, reads="number split seed", language="en", is_guessed=False, is_made=True),
    "bfcl": Source(bfcl, "question function", "ground_truth", language="en"),
    "xlam": Source(xlam, "query tools answers", SYSTEM),
}
MADE = tuple(name for name, source in SOURCES.items() if source.is_made)
