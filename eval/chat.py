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

import copy
import json
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from jinja2 import TemplateError
from transformers import TextStreamer, set_seed

from data_prep.common.errors import UsageError
from eval.common.metrics import final_text
from eval.common.models import (
    adapter_base,
    add_adapter,
    add_model_arguments,
    check_vocabulary,
    fill_of,
    first_line,
    load_tokenizer,
    open_model,
    render,
)
from eval.common.scores import command, parser_of, write_files

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


class Said(NamedTuple):
    """An answer: its text without special tokens, with them, its tokens, whether it ended by itself, why it did not."""

    text: str
    raw: str
    tokens: int
    stopped: bool
    failed: str = ""


class Screen(TextStreamer):
    """Prints an answer as it is made and keeps its tokens."""

    def __init__(self, tokenizer, raw):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=not raw, clean_up_tokenization_spaces=False)
        self.tokens = []

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.tokens += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        print(text, end="", flush=True)


class Talker:
    """A model with its adapters, and how it is asked."""

    def __init__(self, args):
        self.args, first = args, args.models[0]
        self.model, tokenizer, stops = open_model(first, args.base, args.dtype, args.load_in_4bit)
        self.model.generation_config.max_length = None  # else each turn says that max_new_tokens goes before it
        self.names = {}  # name: (PEFT's name, tokenizer, stops)
        for number, folder in enumerate(args.models):
            if number:
                base = adapter_base(folder)
                if not base or not adapter_base(first):
                    raise UsageError(
                        f"{folder if not base else first} is not an adapter: pass adapters of one base only"
                    )
                if not args.base and base != adapter_base(first):
                    raise UsageError(f"{first} and {folder} name different bases: pass --base, or one of them")
                tokenizer, stops = load_tokenizer(folder)
                check_vocabulary(args.base or base, tokenizer)
                self.model = add_adapter(self.model, folder, str(number))
            name = Path(folder).resolve().name
            name = name if name not in {"base", *self.names} else str(folder)
            self.names[name] = (str(number) if number else "default", tokenizer, stops)
        self.use(next(iter(self.names)))

    def use(self, name):
        """Answer with the adapter of that name, or with the base alone."""
        self.name = name
        inner, self.tokenizer, self.stops = self.names.get(name) or next(iter(self.names.values()))
        if name != "base" and hasattr(self.model, "set_adapter") and hasattr(self.model, "peft_config"):
            self.model.set_adapter(inner)

    def switched(self, messages, think, tools):
        """(messages, template arguments) that ask for thinking or none; think None: as the template has it."""
        if think is None:
            return messages, {}
        probe = [{"role": "user", "content": "x"}]
        both = {render(self.tokenizer, probe, True, tools, enable_thinking=value)[0] for value in (True, False)}
        if len(both) == 2:
            return messages, {"enable_thinking": think}
        if "/no_think" not in self.tokenizer.chat_template:
            raise UsageError("this chat template knows no thinking: leave /think and /no_think out")
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        told = {"role": "system", "content": f"{system} {'/think' if think else '/no_think'}".strip()}
        return [told, *messages[bool(system) :]], {}

    def ask(self, messages, think=None, tools=None, raw=False):
        """(prompt, Said), printed as it comes. Raises UsageError where the template refuses."""
        try:
            messages, kwargs = self.switched(messages, think, tools)
            prompt, ids = render(self.tokenizer, messages, True, tools, **kwargs)
        except (TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template refuses this ({first_line(error)})") from None
        config = copy.deepcopy(self.model.generation_config)
        config.update(max_new_tokens=self.args.max_new_tokens, eos_token_id=sorted(self.stops))
        config.update(pad_token_id=fill_of(self.tokenizer, self.stops))
        if self.args.temperature is not None or self.args.top_p is not None:
            greedy = self.args.temperature == 0
            config.update(
                do_sample=not greedy, temperature=1.0 if greedy else self.args.temperature or config.temperature
            )
            config.update(top_p=1.0 if greedy else self.args.top_p or config.top_p)
        screen, failed = Screen(self.tokenizer, raw), ""
        prefix = "<think>\n" if prompt.rstrip().endswith("<think>") else ""  # the template opened it
        print(prefix, end="")
        bare = self.model.disable_adapter() if self.name == "base" else nullcontext()
        try:
            with torch.inference_mode(), bare:
                inputs = torch.tensor([ids], device=self.model.device)
                mask = torch.ones_like(inputs)
                self.model.generate(input_ids=inputs, attention_mask=mask, generation_config=config, streamer=screen)
        except KeyboardInterrupt:
            failed = "stopped"
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            failed = "out of memory"
        if failed:
            with suppress(KeyboardInterrupt):
                screen.end()  # what was held back until a word is whole
        stopped = bool(screen.tokens) and screen.tokens[-1] in self.stops
        body = screen.tokens[:-1] if stopped else screen.tokens

        def decode(tokens, skip):
            return self.tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

        return prompt, Said(prefix + decode(body, True), decode(screen.tokens, False), len(body), stopped, failed)


def message_of(text):
    """The assistant message of an answer, its reasoning apart."""
    if "<think>" not in text:
        return {"role": "assistant", "content": text.strip()}
    thought = text.partition("<think>")[2].partition("</think>")[0].strip()
    return {"role": "assistant", "content": final_text(text)} | ({"reasoning_content": thought} if thought else {})


def ending(said):
    """What is worth saying about how an answer ended."""
    if said.failed:
        return f"[{said.failed} after {said.tokens} tokens]"
    return "" if said.stopped else f"[not ended by itself: {said.tokens} tokens, --max_new_tokens]"


class Chat:
    """A conversation and its commands."""

    def __init__(self, talker, system, raw):
        self.talker, self.system, self.raw, self.think, self.last = talker, system, raw, None, ""
        self.reset()

    def reset(self):
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def line(self, line):
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
            self.adapter(rest)
        elif word == "/raw":
            print(self.last or "nothing was said yet")
        elif word == "/save":
            self.save(rest)
        elif word == "/help":
            print(listed())
        else:
            print(f"unknown command {word}: /help lists them")

    def turn(self, text, think):
        self.messages.append({"role": "user", "content": text})
        try:
            prompt, said = self.talker.ask(self.messages, think, raw=self.raw)
        except UsageError as error:
            self.messages.pop()
            print(error)
            return
        print("" if said.text.endswith("\n") and not ending(said) else f"\n{ending(said)}".rstrip())
        self.last = prompt + said.raw
        self.messages.append(message_of(said.text))

    def switch(self, think, text):
        if text:
            self.turn(text, think)
            return
        try:
            self.talker.switched([{"role": "user", "content": "x"}], think, None)
        except UsageError as error:
            print(error)
            return
        self.think = think
        print("thinks from now on" if think else "does not think from now on")

    def adapter(self, name):
        known = [*self.talker.names, *(["base"] if hasattr(self.talker.model, "peft_config") else [])]
        if name in known:
            self.talker.use(name)
        elif name:
            print(f"no adapter {name}: there is {', '.join(known)}")
            return
        print(f"answers with {self.talker.name} (of {', '.join(known)})")

    def save(self, name):
        if not name or not any(message["role"] == "assistant" for message in self.messages):
            print("nothing to save yet" if name else "/save needs a FILE")
            return
        row = {"id": f"chat with {self.talker.name}", "messages": self.messages}
        row |= {"chat_template_kwargs": {"enable_thinking": self.think}} if self.think is not None else {}
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"cannot write {name} ({error.strerror}): pass another FILE")
            return
        print(f"added {len(self.messages)} messages to {name}")


def listed():
    return "\n".join(f"    {name:17} {does}" for name, does in COMMANDS.items())


def talk(talker, args):
    with suppress(ImportError):
        import readline  # noqa: F401 (input() then edits lines and remembers them)
    chat, asks = Chat(talker, args.system, args.raw), sys.stdin.isatty()
    if asks:
        print(f"{talker.name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            chat.line(input("> " if asks else ""))
        except KeyboardInterrupt:
            print("\nCtrl-D ends")
        except EOFError:
            print(end="\n" if asks else "")
            return


def read_prompts(path):
    try:
        prompts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is not a readable YAML file ({first_line(error)}): repair it") from None
    for number, prompt in enumerate(prompts if isinstance(prompts, list) else [prompts], 1):
        known = isinstance(prompt, dict) and not prompt.keys() - {"name", "system", "tools", "think", "turns"}
        turns = prompt.get("turns") if known else None
        if not turns or not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise UsageError(
                f"{path}, prompt {number} is not {{name, turns: [texts], system?, tools?, think?}}: repair it"
            )
    return prompts


def run_prompts(talker, args):
    """Ask all prompts; a line {name, turn, user, prompt, answer, raw, tokens, stopped, failed} each turn."""
    lines = []
    for number, prompt in enumerate(read_prompts(args.prompts), 1):
        name, system = prompt.get("name") or str(number), prompt.get("system") or args.system
        messages = [{"role": "system", "content": system}] if system else []
        set_seed(args.seed)
        print(f"\n## {name}" + (f"\n\nsystem: {system}" if system else ""))
        for turn, text in enumerate(prompt["turns"], 1):
            messages.append({"role": "user", "content": text})
            line = {"name": name, "turn": turn, "user": text}
            print(f"\n**{text}**\n")
            try:
                before, said = talker.ask(messages, prompt.get("think"), prompt.get("tools"), args.raw)
            except UsageError as error:
                print(error)
                lines.append(line | {"prompt": "", "answer": "", "raw": "", "tokens": 0, "stopped": False,
                                     "failed": str(error)})  # fmt: skip
                break
            print("\n" + ending(said))
            lines.append(line | {"prompt": before, "answer": said.text, **said._asdict()})
            del lines[-1]["text"]
            messages.append(message_of(said.text))
            if said.failed == "stopped":
                return lines
    return lines


def markdown(lines, title, raw):
    """What was asked and answered, as markdown; raw: prompts and answers with every special token, in code blocks."""
    out = [f"# {title}"]
    for line in lines:
        out += [f"## {line['name']}"] if line["turn"] == 1 else []
        out += [f"**{line['user']}**"]
        out += [f"````\n{line['prompt'] + line['raw']}\n````" if raw else line["answer"].strip() or "(nothing)"]
        note = line["failed"] or ("" if line["stopped"] else "not ended by itself")
        out += [f"*{line['tokens']} tokens{', ' * bool(note)}{note}*"]
    return "\n\n".join(out) + "\n"


def parse_args(argv):
    parser = parser_of(__doc__.format(commands=listed()))
    parser.add_argument("models", nargs="+", help="run folder: a model, or adapters on one base")
    parser.add_argument("--base", help="the base of the adapters (default: the one that they name)")
    add_model_arguments(parser, 1024, batched=False)
    parser.add_argument("--system", default="", help="system prompt")
    parser.add_argument("--temperature", type=float, help="0: greedy (default: the model's generation_config)")
    parser.add_argument("--top_p", type=float, help="nucleus (default: the model's generation_config)")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling")
    parser.add_argument("--raw", action="store_true", help="show every special token")
    parser.add_argument("--prompts", type=Path, help="YAML file of prompts to run instead of a chat")
    parser.add_argument("--out", type=Path, help="with --prompts: .jsonl or markdown file for the answers")
    return parser.parse_args(argv)


def run(args):
    if args.out and not args.prompts:
        raise UsageError("--out goes with --prompts: /save keeps a chat")
    if args.prompts:
        read_prompts(args.prompts)  # before minutes of loading
    talker = Talker(args)
    set_seed(args.seed)
    if not args.prompts:
        talk(talker, args)
        return
    lines = run_prompts(talker, args)
    if args.out:
        text = markdown(lines, talker.name, args.raw)
        if args.out.suffix == ".jsonl":
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_files(args.out.parent, {args.out.name: text})
        print(f"wrote {len(lines)} answers to {args.out}")


def main(argv=None):
    return command("chat.py", run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
