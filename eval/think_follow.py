"""ThinkFollow: does a model think when a turn says /think, and not when it says /no_think?

    python -m eval.think_follow runs/qwen3_full --data mt_bench_question.jsonl

Follows the description in the playbook of SmolLM3 (no code is published): conversations of several turns (Multi-IF's
there), each turn told /think or /no_think at random, the model's own answers as history. A think turn is followed by an
answer with a thought that is not empty, a no_think turn by one with an empty thought or none. The draw depends on
--seed and the conversation's id alone. A model that never heeds the flag gets about one half: look at both modes.

    follow      turns that did as told; an answer that failed (memory, time, context, refused history) did not
    follow_all  conversations whose every turn did
    unfinished  turns whose thought was begun and never ends: what is there counts for follow
    empty       turns with nothing beside the thought; a thought that never ends is followed by nothing
    stop_rate   turns ended by a stop token within the budget

Where the flag stands (--flag_in): `system`, at the end of the system message, which holds that of the turn to be
answered; `kwargs`, the template's enable_thinking; `user`, at the end of the turn's message. The default is what the
model's own template reacts to, in this order (SmolLM3's to the first, most hybrids' to the second), else `user`, which
is also the switch in the text that Qwen3 of April 2025 was trained on. Where the prompt itself holds the empty thought
of no_think, follow says whether the model leaves it at that. Answers are read as the template's family writes them
(data_prep/common/answers.py). Earlier ones stand in the history as their text alone, as the clients of a server send
them: without their thoughts, and without calls, for which there are no functions here.

--data: rows with `turns` (MT-Bench), with `turn_1_prompt` … (Multi-IF) or with `messages`, whose user turns are taken.
Groups: mode and turn. Writes think_follow.json and think_follow.jsonl to --out.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data_prep.common.answers import find_family, parse_answer
from data_prep.common.errors import UsageError
from eval.common.arguments import add_model_arguments, first_line, positive
from eval.common.intervals import rate
from eval.common.measure import clean_row, read_rows
from eval.common.models import Answer, OpenedModel, Prompt, ask, choose_mode, mode_kwargs, open_model, render
from eval.common.scores import command, grouped, parser_of, rates, show, write_scores

METRICS = {"follow": "follow", "unfinished": "unfinished", "empty": "empty", "stop_rate": "stopped"}
MODES = ("think", "no_think")
FLAG = re.compile(r"\s*/(?:no_think|think)\b")


# -- conversations ----------------------------------------------------------------------------------------------------
@dataclass
class Conversation:
    """The system message and the user's turns of a row, without flags of their own."""

    id: str
    system: str
    turns: list[str]


def read_conversation(row: object, number: int) -> Conversation:
    """Return the conversation of the number-th row. Raises UsageError."""
    place = f"row {number} of the data"
    system = ""
    if not isinstance(row, dict):
        raise UsageError(f"{place} is not an object: pass rows with turns, turn_1_prompt or messages")
    if "turn_1_prompt" in row:  # before `turns`, where Multi-IF has room for a history
        turns = read_multi_if(row, place)
    elif "turns" in row:
        turns = row["turns"]
    else:
        messages = clean_row(row, number)["messages"]
        if messages[0]["role"] == "system":
            system = messages[0].get("content", "")
        turns = [message.get("content") for message in messages if message["role"] == "user"]
    if not is_texts(turns):
        raise UsageError(f"{place} has no turns, or one that is not text: pass the user's messages as strings")
    turns = [FLAG.sub("", turn) for turn in turns]
    return Conversation(row_name(row, number), FLAG.sub("", system), turns)


def is_texts(turns: object) -> bool:
    """Return whether something is a list of texts that are not blank, and holds one."""
    if not isinstance(turns, list) or not turns:
        return False
    return all([isinstance(turn, str) and turn.strip() for turn in turns])


def read_multi_if(row: dict, place: str) -> list[object]:
    """Return the user's turns of a row of Multi-IF, messages in JSON of which the last may be missing."""
    turns = []
    for turn in (1, 2, 3):
        text = row.get(f"turn_{turn}_prompt")
        if text in (None, "", "None"):
            continue
        try:
            turns.append(json.loads(text)["content"])
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"{place} has a turn that is no message in JSON ({first_line(error)}): repair it"
            ) from None
    return turns


def row_name(row: dict, number: int) -> str:
    """Return what a row is called: its own id, or its number."""
    for key in ("id", "question_id", "key"):
        if row.get(key) is not None:
            return str(row[key])
    return str(number)


def draw_modes(conversation: Conversation, seed: int) -> list[str]:
    """Return the mode of each turn, whatever else is measured with the conversation."""
    rng = random.Random(f"{seed} {conversation.id}")
    return [rng.choice(MODES) for _ in conversation.turns]


# -- prompts ----------------------------------------------------------------------------------------------------------
def find_flag_place(tokenizer: PreTrainedTokenizerBase, run: Path) -> str:
    """Return where the tokenizer's template itself reads a flag: system, kwargs, or user where it reads none.

    run: what a message names.
    """
    endings = []
    for mode in MODES:
        messages = [{"role": "system", "content": f"/{mode}"}, {"role": "user", "content": "Hi"}]
        try:
            endings.append(render(tokenizer, messages).text.rpartition("Hi")[2])
        except (TemplateError, TypeError, ValueError):  # it has no system message
            endings.append(None)
    if endings[0] != endings[1]:
        return "system"
    if choose_mode(tokenizer, None, run) is None:
        return "user"
    return "kwargs"


def render_turn(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    answers: list[str],
    modes: list[str],
    place: str,
) -> Prompt:
    """Return the prompt of the turn behind the given answers. Raises UsageError.

    modes: of each turn. place: of the flag.
    """
    mode = modes[len(answers)]
    system = conversation.system
    if place == "system":
        system = f"{system} /{mode}".strip()
    messages = []
    if system:
        messages.append({"role": "system", "content": system})
    for number in range(len(answers) + 1):
        text = conversation.turns[number]
        if place == "user":
            text = f"{text} /{modes[number]}"
        messages.append({"role": "user", "content": text})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
    kwargs = mode_kwargs(mode) if place == "kwargs" else {}
    try:
        return render(tokenizer, messages, **kwargs)
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"the model's template refuses conversation {conversation.id} ({first_line(error)}): leave it out, or pass "
            "another --flag_in"
        ) from None


# -- answers ----------------------------------------------------------------------------------------------------------
class Talk:
    """A conversation under way. lines: of think_follow.jsonl, one a turn; answers: the texts of the earlier turns."""

    def __init__(self, conversation: Conversation, seed: int) -> None:
        self.conversation = conversation
        self.modes = draw_modes(conversation, seed)
        self.answers: list[str] = []
        self.lines: list[dict] = []

    @property
    def follows(self) -> bool:
        """Whether every turn did as told."""
        return all([line["follow"] for line in self.lines])

    def render(self, tokenizer: PreTrainedTokenizerBase, place: str) -> Prompt | None:
        """Return the prompt of the next turn, None where the template refuses the history.

        An earlier answer may hold what it refuses. Raises UsageError where it refuses the first turn.
        """
        try:
            return render_turn(tokenizer, self.conversation, self.answers, self.modes, place)
        except UsageError:
            if self.answers:
                return None
            raise

    def add_answer(self, family: str, prompt: Prompt | None, answer: Answer) -> None:
        """Judge the answer to a prompt, and take it into the history."""
        turn = len(self.answers)
        mode = self.modes[turn]
        said = parse_answer(answer.text, family, prompt.text if prompt else "")
        thought = said.reasoning or ""
        self.answers.append(said.content.strip())
        self.lines.append(
            {
                "id": self.conversation.id,
                "turn": turn + 1,
                "mode": mode,
                "answer": answer.text,
                "failed": answer.failed,
                "thought": len(thought.strip()),
                "stopped": answer.stopped,
                "follow": not answer.failed and bool(thought.strip()) == (mode == "think"),
                "unfinished": not said.is_complete and not said.error,
                "empty": not (said.content.strip() or said.tool_calls),
            }
        )


def hold_talks(
    conversations: list[Conversation], opened: OpenedModel, place: str, args: argparse.Namespace
) -> list[Talk]:
    """Return all conversations, held to their ends a turn of each at a time. place: of the flag. Raises UsageError."""
    model, tokenizer, stops = opened
    family = find_family(tokenizer.chat_template)
    talks = [Talk(conversation, args.seed) for conversation in conversations]
    for turn in range(max([len(talk.modes) for talk in talks])):
        asked = [talk for talk in talks if turn < len(talk.modes)]
        prompts = [talk.render(tokenizer, place) for talk in asked]
        ids = [prompt.ids for prompt in prompts if prompt is not None]
        label = f"turn {turn + 1}"
        answers = iter(ask(model, tokenizer, stops, ids, args.batch_size, args.max_new_tokens, label, args.timeout))
        for talk, prompt in zip(asked, prompts, strict=True):
            if prompt is None:
                answer = Answer("", 0, False, "refused by the template")
            else:
                answer = next(answers)
            talk.add_answer(family, prompt, answer)
    return talks


# -- the command ------------------------------------------------------------------------------------------------------
def read_conversations(args: argparse.Namespace) -> list[Conversation]:
    """Return the conversations of the data, or those that are drawn. Raises UsageError."""
    rows = read_rows(args.data, args.split)
    conversations = [read_conversation(row, number) for number, row in enumerate(rows, 1)]
    if not conversations:
        raise UsageError(f"{args.data} holds no rows: pass a set with at least one conversation")
    if args.rows and args.rows < len(conversations):
        drawn = random.Random(args.seed).sample(range(len(conversations)), args.rows)
        conversations = [conversations[number] for number in sorted(drawn)]
    return conversations


def measure_follow(args: argparse.Namespace) -> None:
    """Run the command. Raises UsageError."""
    conversations = read_conversations(args)
    text = json.dumps([asdict(conversation) for conversation in conversations], sort_keys=True)
    opened = open_model(args.run, args.base, args.dtype, args.load_in_4bit)
    place = args.flag_in or find_flag_place(opened.tokenizer, args.run)
    talks = hold_talks(conversations, opened, place, args)
    lines = []
    for talk in talks:
        lines.extend(talk.lines)
    metrics = rates(lines, METRICS)
    metrics["follow_all"] = rate([talk.follows for talk in talks])
    settings = {
        "model": args.run.resolve().name,
        "data": args.data.resolve().name,
        "flag_in": place,
        "family": find_family(opened.tokenizer.chat_template),
        "rows": args.rows,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "load_in_4bit": args.load_in_4bit,
    }
    groups = grouped(lines, METRICS, "mode", "turn")
    digest = hashlib.sha256(text.encode()).hexdigest()
    show(write_scores(args.out or args.run / "eval", "think_follow", settings, metrics, groups, lines, digest))
    print(f"the flag stood in: {place}")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the command."""
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, help="run folder: a model with its tokenizer, or an adapter")
    parser.add_argument("--base", help="of an adapter (default: the one that it names)")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl, .json or .parquet file, or dataset folder")
    parser.add_argument("--split", default="test", help="split of a dataset folder that has several")
    parser.add_argument("--flag_in", choices=["user", "system", "kwargs"], help="default: what the template reads")
    parser.add_argument("--rows", type=positive, help="so many conversations, drawn by --seed (default: all)")
    parser.add_argument("--seed", type=int, default=42, help="of the flags and of --rows")
    parser.add_argument("--out", type=Path, help="folder of the scores (default: eval/ in the run)")
    add_model_arguments(parser, max_new_tokens=1024)
    return command("think_follow.py", measure_follow, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
