"""Talk to a model, or to several adapters on one base, in the terminal; or run prepared prompts through it.

    python -m eval.chat runs/qwen3_qlora
    python -m eval.chat runs/a runs/b --system "You are a pirate." --temperature 0
    python -m eval.chat runs/qwen3_qlora --prompts eval/vibe.yaml --raw --out vibe.md

Answers stream as they are made. Ctrl-C stops the answer, not the program; Ctrl-D ends. The commands:
{commands}
Sampling is that of the model's generation_config; --temperature 0 is greedy. /think and /no_think go through the chat
template: as enable_thinking where that changes the prompt, else as the words it looks for in the system message. A
template that refuses a conversation says why, and the turn is taken back.

--prompts takes a YAML list of {{name, turns: [user texts], system?, tools?, think?: true or false}} (vibe.yaml). Each
prompt starts anew from --seed, each turn follows the model's own answer; a tool call is shown, not executed. --raw
shows every special token, in --out the prompt too. --out writes the answers: JSON lines to .jsonl, else markdown.
"""

import argparse
import copy
import importlib
import json
import re
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer, set_seed

from data_prep.common.answer_formats import FORMATS
from data_prep.common.answers import find_family, parse_answer
from data_prep.common.errors import InvalidRow, UsageError
from data_prep.common.parsing import parse_tools
from data_prep.common.yaml_text import load_yaml
from eval.common.arguments import add_model_arguments, first_line
from eval.common.models import (
    Prompt,
    adapter_base,
    add_adapter,
    check_vocabulary,
    choose_mode,
    fill_of,
    load_tokenizer,
    mode_kwargs,
    open_model,
    remove_tokens,
    render,
)
from eval.common.scores import command, parser_of, write_files
from eval.common.tool_messages import add_call_ids

BASE = "base"  # the name of the model without an adapter
PROBE = [{"role": "user", "content": "x"}]
COMMANDS = {
    "/system TEXT": "another system prompt, none without TEXT; the conversation starts anew",
    "/think [TEXT]": "think from now on; with TEXT, for this turn",
    "/no_think [TEXT]": "do not think from now on; with TEXT, for this turn",
    "/reset": "start the conversation anew",
    "/adapter [NAME]": "answer with that adapter from now on, 'base' with none; alone: which there are",
    "/raw": "the last prompt and answer with every special token",
    "/save FILE": "add the conversation to FILE as one line, a row of messages",
    "/help": "this list",
}


# -- answers ----------------------------------------------------------------------------------------------------------
@dataclass
class Reply:
    """An answer. prompt: what it goes on from; text: without special tokens; raw: with them; tokens: how many, without
    the stop token; stopped: whether it ended by itself; failed: why it did not; message: what it says, as a row holds
    it."""

    prompt: str
    text: str
    raw: str
    tokens: int
    stopped: bool
    failed: str
    message: dict

    @property
    def ending(self) -> str:
        """What is worth saying about how it ended."""
        if self.failed:
            return f"[{self.failed} after {self.tokens} tokens]"
        if not self.stopped:
            return f"[not ended by itself: {self.tokens} tokens, --max_new_tokens]"
        return ""


class Screen(TextStreamer):
    """Prints an answer as it is made and keeps its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, raw: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=not raw, clean_up_tokenization_spaces=False)
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, end="", flush=True)


def to_message(
    text: str, family: str, prompt: str, tools: list[dict] | None = None, special: tuple[str, ...] = ()
) -> dict:
    """Return the assistant's message of an answer with its control tokens. special: those that no message keeps."""
    answer = parse_answer(text, family, prompt, tools)
    message = {"role": "assistant", "content": remove_tokens(answer.content, special)}
    reasoning = remove_tokens(answer.reasoning or "", special)
    if reasoning:
        message["reasoning_content"] = reasoning
    if answer.tool_calls:
        message["tool_calls"] = answer.tool_calls
    return message


# -- models -----------------------------------------------------------------------------------------------------------
@dataclass
class Voice:
    """An adapter by PEFT's name, or the whole model, with its tokenizer and the ids of its stop tokens."""

    adapter: str
    tokenizer: PreTrainedTokenizerBase
    stops: set[int]


class Asked(NamedTuple):
    """A conversation, and what the template is given besides."""

    messages: list[dict]
    kwargs: dict[str, bool]


class Talker:
    """A model with its adapters, and how it is asked."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        first = args.models[0]
        self.model, tokenizer, stops = open_model(first, args.base, args.dtype, args.load_in_4bit)
        self.model.generation_config.max_length = None  # else each turn says that max_new_tokens goes before it
        self.voices: dict[str, Voice] = {}
        self.add_voice(first, Voice("default", tokenizer, stops))
        for number, folder in enumerate(args.models[1:], 1):
            base = self.check_base(first, folder)
            tokenizer, stops = load_tokenizer(folder)
            check_vocabulary(args.base or base, tokenizer)
            self.model = add_adapter(self.model, folder, str(number))
            self.add_voice(folder, Voice(str(number), tokenizer, stops))
        self.use(next(iter(self.voices)))

    def check_base(self, first: str, folder: str) -> str:
        """Return the base that a further adapter names. Raises UsageError where it is not that of the first one."""
        base = adapter_base(folder)
        first_base = adapter_base(first)
        if not base:
            raise UsageError(f"{folder} is not an adapter: pass adapters of one base only")
        if not first_base:
            raise UsageError(f"{first} is not an adapter: pass adapters of one base only")
        if not self.args.base and base != first_base:
            raise UsageError(f"{first} and {folder} name different bases: pass --base, or one of them")
        return base

    def add_voice(self, folder: str, voice: Voice) -> None:
        """Add a model under the name of its folder, or its path where that is taken."""
        name = Path(folder).resolve().name
        if name == BASE or name in self.voices:
            name = str(folder)
        self.voices[name] = voice

    @property
    def has_adapters(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def names(self) -> list[str]:
        """What can answer."""
        names = list(self.voices)
        if self.has_adapters:
            names.append(BASE)
        return names

    def use(self, name: str) -> None:
        """Answer with the adapter of that name, or with the base alone."""
        self.name = name
        voice = self.voices.get(name) or next(iter(self.voices.values()))
        self.tokenizer = voice.tokenizer
        self.stops = voice.stops
        if name != BASE and self.has_adapters:
            self.model.set_adapter(voice.adapter)

    def switch_thinking(self, messages: list[dict], think: bool | None) -> Asked:
        """Return what asks for thinking or none; None: as the template has it.

        Raises UsageError for a template that knows neither.
        """
        if think is None:
            return Asked(messages, {})
        mode = "think" if think else "no_think"
        if choose_mode(self.tokenizer, None, self.name) is not None:
            return Asked(messages, mode_kwargs(mode))
        if "/no_think" not in self.tokenizer.chat_template:
            raise UsageError("this chat template knows no thinking: leave /think and /no_think out")
        system = ""
        if messages[0]["role"] == "system":
            system = messages[0]["content"]
            messages = messages[1:]
        flagged = {"role": "system", "content": f"{system} /{mode}".strip()}
        return Asked([flagged, *messages], {})

    def render(self, messages: list[dict], think: bool | None, tools: list[dict] | None) -> Prompt:
        """Return the prompt of a conversation. Raises UsageError where the template refuses it."""
        family = find_family(self.tokenizer.chat_template)
        try:
            messages, kwargs = self.switch_thinking(messages, think)
            return render(self.tokenizer, add_call_ids(messages, family), True, tools, **kwargs)
        except (TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template refuses this ({first_line(error)})") from None

    def choose_sampling(self) -> GenerationConfig:
        """Return the model's own settings of generation, with the command's."""
        config = copy.deepcopy(self.model.generation_config)
        config.update(max_new_tokens=self.args.max_new_tokens)
        config.update(eos_token_id=sorted(self.stops), pad_token_id=fill_of(self.tokenizer, self.stops))
        if self.args.temperature == 0:
            config.update(do_sample=False, temperature=1.0, top_p=1.0)
            return config
        if self.args.temperature is not None:
            config.update(do_sample=True, temperature=self.args.temperature)
        if self.args.top_p is not None:
            config.update(do_sample=True, top_p=self.args.top_p)
        return config

    def ask(
        self, messages: list[dict], think: bool | None = None, tools: list[dict] | None = None, raw: bool = False
    ) -> Reply:
        """Return the answer, which is printed as it comes. Raises UsageError.

        think: whether it is asked to, None: as the template has it. raw: special tokens are shown.
        """
        prompt = self.render(messages, think, tools)
        family = find_family(self.tokenizer.chat_template)
        begun = re.search(rf"{FORMATS[family].thought_start}\s*\Z", prompt.text)  # the template opened a thought
        opening = begun[0] if begun else ""
        print(opening, end="")
        screen = Screen(self.tokenizer, raw)
        failed = self.generate(prompt.ids, screen)
        stopped = bool(screen.tokens) and screen.tokens[-1] in self.stops
        body = screen.tokens[:-1] if stopped else screen.tokens
        special = tuple(self.tokenizer.all_special_tokens)
        message = to_message(self.decode(body, False), family, prompt.text, tools, special)
        return Reply(
            prompt=prompt.text,
            text=opening + self.decode(body, True),
            raw=self.decode(screen.tokens, False),
            tokens=len(body),
            stopped=stopped,
            failed=failed,
            message=message,
        )

    def generate(self, ids: list[int], screen: Screen) -> str:
        """Let the model answer to a screen; return why it did not come to an end, "" where it did."""
        bare = self.model.disable_adapter() if self.name == BASE else nullcontext()
        failed = ""
        try:
            with torch.inference_mode(), bare:
                inputs = torch.tensor([ids], device=self.model.device)
                self.model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    generation_config=self.choose_sampling(),
                    streamer=screen,
                )
        except KeyboardInterrupt:
            failed = "stopped"
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            failed = "out of memory"
        if failed:
            with suppress(KeyboardInterrupt):
                screen.end()  # what was held back until a word is whole
        return failed

    def decode(self, tokens: list[int], skip_special: bool) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)


# -- a conversation ---------------------------------------------------------------------------------------------------
class Chat:
    """A conversation and its commands."""

    def __init__(self, talker: Talker, system: str, raw: bool) -> None:
        self.talker = talker
        self.system = system
        self.raw = raw
        self.think: bool | None = None
        self.last = ""  # prompt and answer with every special token
        self.reset()

    def reset(self) -> None:
        self.messages = start_messages(self.system)

    def read_line(self, line: str) -> None:
        """Do what a line says: a command, or a turn."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if not word:
            return
        if not word.startswith("/"):
            self.turn(line.strip(), self.think)
        elif word in ("/think", "/no_think"):
            self.switch(word == "/think", rest)
        elif word == "/system":
            self.system = rest
            self.reset()
            print(f"system prompt: {rest or 'none'}; a new conversation")
        elif word == "/reset":
            self.reset()
            print("a new conversation")
        elif word == "/adapter":
            self.choose_adapter(rest)
        elif word == "/raw":
            print(self.last or "nothing was said yet")
        elif word == "/save":
            self.save(rest)
        elif word == "/help":
            print(list_commands())
        else:
            print(f"unknown command {word}: /help lists them")

    def turn(self, text: str, think: bool | None) -> None:
        self.messages.append({"role": "user", "content": text})
        try:
            reply = self.talker.ask(self.messages, think, raw=self.raw)
        except UsageError as error:
            self.messages.pop()
            print(error)
            return
        print()
        if reply.ending:
            print(reply.ending)
        self.last = reply.prompt + reply.raw
        self.messages.append(reply.message)

    def switch(self, think: bool, text: str) -> None:
        """Think or not from now on; with a text, for this turn."""
        if text:
            self.turn(text, think)
            return
        try:
            self.talker.switch_thinking(PROBE, think)
        except UsageError as error:
            print(error)
            return
        self.think = think
        print("thinks from now on" if think else "does not think from now on")

    def choose_adapter(self, name: str) -> None:
        names = ", ".join(self.talker.names)
        if name in self.talker.names:
            self.talker.use(name)
        elif name:
            print(f"no adapter {name}: there is {names}")
            return
        print(f"answers with {self.talker.name} (of {names})")

    def save(self, name: str) -> None:
        """Add the conversation to a file as one row."""
        if not name:
            print("/save needs a FILE")
            return
        if not any([message["role"] == "assistant" for message in self.messages]):
            print("nothing to save yet")
            return
        row = {"id": f"chat with {self.talker.name}", "messages": self.messages}
        if self.think is not None:
            row["chat_template_kwargs"] = {"enable_thinking": self.think}
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"cannot write {name} ({error.strerror}): pass another FILE")
            return
        print(f"added {len(self.messages)} messages to {name}")


def start_messages(system: str) -> list[dict]:
    """Return the messages of a conversation before its first turn."""
    if not system:
        return []
    return [{"role": "system", "content": system}]


def list_commands() -> str:
    return "\n".join([f"    {name:17} {meaning}" for name, meaning in COMMANDS.items()])


def hold_chat(talker: Talker, args: argparse.Namespace) -> None:
    """Talk in the terminal, or with the lines of standard input, until they end."""
    with suppress(ImportError):
        importlib.import_module("readline")  # input() then edits lines and remembers them
    chat = Chat(talker, args.system, args.raw)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print(f"{talker.name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            chat.read_line(input("> " if is_terminal else ""))
        except KeyboardInterrupt:
            print("\nCtrl-D ends")
        except EOFError:
            if is_terminal:
                print()
            return


# -- prepared prompts -------------------------------------------------------------------------------------------------
def read_prompts(path: Path) -> list[dict]:
    """Return the prompts of a YAML file. Raises UsageError."""
    try:
        prompts = load_yaml(path)
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not a readable YAML file ({first_line(error)}): repair it") from None
    if not isinstance(prompts, list):
        prompts = [prompts]
    for number, prompt in enumerate(prompts, 1):
        if not is_prompt(prompt):
            raise UsageError(
                f"{path}, prompt {number} is not {{name, turns: [texts], system?, tools?, think?}}: repair it"
            )
        try:
            parse_tools(prompt.get("tools"))
        except InvalidRow as error:
            raise UsageError(f"{path}, prompt {number} has {first_line(error)}: repair it") from None
    return prompts


def is_prompt(prompt: object) -> bool:
    """Return whether an entry of a file of prompts has turns, and no key that is not known."""
    if not isinstance(prompt, dict) or prompt.keys() - {"name", "system", "tools", "think", "turns"}:
        return False
    turns = prompt.get("turns")
    return isinstance(turns, list) and bool(turns) and all([isinstance(turn, str) for turn in turns])


def run_prompts(talker: Talker, args: argparse.Namespace) -> list[dict]:
    """Ask all prompts; return a line {name, turn, user, prompt, answer, raw, tokens, stopped, failed} a turn."""
    lines = []
    for number, prompt in enumerate(read_prompts(args.prompts), 1):
        name = prompt.get("name") or str(number)
        system = prompt.get("system") or args.system
        messages = start_messages(system)
        set_seed(args.seed)
        print(f"\n## {name}")
        if system:
            print(f"\nsystem: {system}")
        for turn, text in enumerate(prompt["turns"], 1):
            messages.append({"role": "user", "content": text})
            asked = {"name": name, "turn": turn, "user": text}
            print(f"\n**{text}**\n")
            try:
                reply = talker.ask(messages, prompt.get("think"), prompt.get("tools"), args.raw)
            except UsageError as error:
                print(error)
                lines.append(asked | to_output(Reply("", "", "", 0, False, str(error), {})))
                break
            print("\n" + reply.ending)
            lines.append(asked | to_output(reply))
            messages.append(reply.message)
            if reply.failed == "stopped":
                return lines
    return lines


def to_output(reply: Reply) -> dict:
    """Return what --out keeps of an answer."""
    return {
        "prompt": reply.prompt,
        "answer": reply.text,
        "raw": reply.raw,
        "tokens": reply.tokens,
        "stopped": reply.stopped,
        "failed": reply.failed,
    }


def to_markdown(lines: list[dict], title: str, raw: bool) -> str:
    """Return what was asked and answered. raw: prompts and answers with every special token, in code blocks."""
    paragraphs = [f"# {title}"]
    for line in lines:
        if line["turn"] == 1:
            paragraphs.append(f"## {line['name']}")
        paragraphs.append(f"**{line['user']}**")
        if raw:
            paragraphs.append(f"````\n{line['prompt'] + line['raw']}\n````")
        else:
            paragraphs.append(line["answer"].strip() or "(nothing)")
        notes = [f"{line['tokens']} tokens"]
        if line["failed"]:
            notes.append(line["failed"])
        elif not line["stopped"]:
            notes.append("not ended by itself")
        paragraphs.append(f"*{', '.join(notes)}*")
    return "\n\n".join(paragraphs) + "\n"


# -- the command ------------------------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__.format(commands=list_commands()))
    parser.add_argument("models", nargs="+", help="run folder: a model, or adapters on one base")
    parser.add_argument("--base", help="the base of the adapters (default: the one that they name)")
    add_model_arguments(parser, max_new_tokens=1024, batched=False)
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--temperature", type=float, help="0: greedy (default: the model's generation_config)")
    parser.add_argument("--top_p", type=float, help="nucleus (default: the model's generation_config)")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling")
    parser.add_argument("--raw", action="store_true", help="show every special token")
    parser.add_argument("--prompts", type=Path, help="YAML file of prompts to run instead of a chat")
    parser.add_argument("--out", type=Path, help="with --prompts: .jsonl or markdown file for the answers")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Run the command. Raises UsageError."""
    if args.out and not args.prompts:
        raise UsageError("--out goes with --prompts: /save keeps a chat")
    if args.prompts:
        read_prompts(args.prompts)  # before minutes of loading
    talker = Talker(args)
    set_seed(args.seed)
    if not args.prompts:
        hold_chat(talker, args)
        return
    lines = run_prompts(talker, args)
    if args.out:
        if args.out.suffix == ".jsonl":
            text = "".join([json.dumps(line, ensure_ascii=False) + "\n" for line in lines])
        else:
            text = to_markdown(lines, talker.name, args.raw)
        write_files(args.out.parent, {args.out.name: text})
        print(f"wrote {len(lines)} answers to {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Return the exit code of the command."""
    return command("chat.py", run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
