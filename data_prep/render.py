"""What a run would train on, told without starting it: a recipe's settings, the rows, their tokens, mask and packs.

    settings = read_settings("recipes/qwen3_qlora.py", flags={"max_length": 512})
    against, (rows, *_) = load_against(settings), load_rows("data/chats", settings)
    for doc in documents(rows, against, settings):
        print(doc.ids, doc.mask())

No script: check.py, expand_turns.py and preview.py read rows and a run through it. It does what TRL 1.16's SFTTrainer
does with the rows, without importing TRL (4 s); tests/test_preview.py holds every piece against TRL, transformers and
datasets themselves. What the user can mend raises BadInput, a row that cannot be used raises Refused.
"""

import ast
import bisect
import difflib
import json
import math
import re
import runpy
import sys
from collections import Counter, defaultdict, deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from unicodedata import is_normalized

from pool import read_rows
from rows import (
    CONTROL,
    MARKS,
    SWITCH,
    BadInput,
    Refused,
    refuse_half_pairs,
    strings,
    tools_of,
    turns_of,
)

MAP_BATCH = 1000  # datasets' default batch of map(): TRL packs within it, never across
PERSONAS = ("custom_instructions", "system_prompt", "model_identity")  # template arguments that say who speaks

# the names that decide what is trained, with the values that TRL and RecipeArguments give them where a recipe is silent
READ = {
    "model_name_or_path": None, "model_revision": "main", "chat_template_path": None, "eos_token": None,
    "assistant_only_loss": False, "completion_only_loss": None, "dataset_text_field": "text",
    "packing": False, "packing_strategy": "bfd", "padding_free": False, "max_length": 1024,
    "truncation_mode": "keep_start",
    "shuffle_dataset": False, "dataset_num_proc": None, "dataset_train_split": "train", "dataset_test_split": "test",
    "eval_rows": 0, "seed": 42,
    "global_batch_size": 16, "per_device_train_batch_size": 8, "num_train_epochs": 3.0, "max_steps": -1,
    "one_stream": False, "whole_steps": False,  # of the nanochat recipes alone
}  # fmt: skip
CHOICES = {"packing_strategy": ("bfd", "bfd_split", "wrapped"), "truncation_mode": ("keep_start", "keep_end")}
AT_LEAST = {"max_length": 1, "global_batch_size": 1, "per_device_train_batch_size": 1, "eval_rows": 0, "seed": 0}


# -- a recipe's settings: DEFAULTS < YAML < flags ---------------------------------------------------------------------
def read_defaults(recipe):
    """DEFAULTS of a recipe file. Running the whole file takes 5 s of imports, so first only what stands above it and
    needs the standard library; where that is not enough, the whole file. Raises BadInput."""
    path = Path(recipe)
    if not path.is_file():
        raise BadInput(f"{recipe}: no such recipe: pass a file like recipes/qwen3_qlora.py as --recipe")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"{recipe}: not a Python file ({error}): pass a recipe as --recipe") from None
    keep = []
    for node in tree.body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.FunctionDef)) or (
            modules and all(module.split(".")[0] in sys.stdlib_module_names for module in modules)
        ):
            keep.append(node)
        if isinstance(node, ast.Assign) and any(getattr(name, "id", "") == "DEFAULTS" for name in node.targets):
            break
    else:
        raise BadInput(f"{recipe}: has no DEFAULTS: pass a recipe like recipes/qwen3_qlora.py")
    scope = {"__file__": str(path), "__name__": path.stem}
    try:
        exec(compile(ast.Module(keep, []), str(path), "exec"), scope)
    except Exception:
        try:
            scope = runpy.run_path(str(path))
        except Exception as error:
            raise BadInput(f"{recipe}: DEFAULTS cannot be read ({type(error).__name__}: {error}): mend it") from None
    if not isinstance(scope["DEFAULTS"], dict):
        raise BadInput(f"{recipe}: DEFAULTS is no dict: write DEFAULTS = dict(name=value, ...)")
    return scope["DEFAULTS"]


def read_settings(recipe=None, config=None, flags=None):
    """A namespace of READ's names. flags: {name: value}, None where a flag was not given. Raises BadInput."""
    given = [(recipe, read_defaults(recipe) if recipe else {}), (config, read_yaml(config) if config else {})]
    given.append(("the command line", {name: value for name, value in (flags or {}).items() if value is not None}))
    settings, source = dict(READ), {}
    for where, values in given:
        for name in values:
            if near := name not in READ and difflib.get_close_matches(str(name), READ, 1, 0.9):
                raise BadInput(f"{where}: {name} is no name that a recipe knows: write {near[0]}")
        settings |= {name: values[name] for name in READ if name in values}
        source |= {name: where for name in READ if name in values}
    for name, value in settings.items():
        settings[name] = typed(name, value, source.get(name))
    settings = SimpleNamespace(**settings, data="")  # load_rows says which
    if settings.global_batch_size % settings.per_device_train_batch_size:
        raise BadInput(
            f"global_batch_size {settings.global_batch_size}: must be a multiple of per_device_train_batch_size "
            f"{settings.per_device_train_batch_size}, change one of them"
        )
    if settings.packing and settings.max_length is None:
        raise BadInput("max_length: packing needs one, pass --max_length or --packing false")
    return settings


def refuse_unnamed_mask(settings: SimpleNamespace, assistant_only_loss: bool | None) -> None:
    """Raise BadInput where a recipe or config for compiled sets, which have their labels, is to say what is trained of
    rows of messages. assistant_only_loss: the flag, None where it was not passed."""
    if settings.padding_free and not settings.assistant_only_loss and assistant_only_loss is None:
        raise BadInput(
            "assistant_only_loss: these settings are for compiled sets and name no mask: pass --assistant_only_loss "
            "true, or false to train every token"
        )


def read_yaml(path):
    """{name: value} of a YAML file, as --config takes it. Raises BadInput."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}): pass a YAML file as --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not YAML ({' '.join(str(error).split())}): mend it") from None
    if not isinstance(values, dict):
        raise BadInput(f"{path}: holds no names: write lines of `name: value`")
    return values


def typed(name, value, where):
    """The value where it has the name's type; YAML and a careless recipe may give any other. Raises BadInput."""
    default, number = READ[name], isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None and (default is None or name == "max_length"):
        return None
    if isinstance(default, bool) or name == "completion_only_loss":
        fine, wanted = isinstance(value, bool), "true or false"
    elif name in CHOICES:
        fine, wanted = value in CHOICES[name], "one of " + ", ".join(CHOICES[name])
    elif isinstance(default, float):
        fine, wanted = number and 0 < value < math.inf, "a number above 0"
    elif isinstance(default, int) or name == "dataset_num_proc":
        fine = number and isinstance(value, int) and value >= AT_LEAST.get(name, -1)
        wanted = "a whole number" + (f" of at least {AT_LEAST[name]}" if name in AT_LEAST else "")
    else:
        fine, wanted = isinstance(value, str), "text"
    if not fine:
        raise BadInput(f"{where}: {name} is {value!r}, it must be {wanted}")
    return value


# -- tokenizer and template -------------------------------------------------------------------------------------------
def load_tokenizer(settings):
    """The recipe's tokenizer, as SFTTrainer sets it up. Raises BadInput."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # rows may be longer than the model's context
    name = settings.model_name_or_path
    if not name:
        raise BadInput("model_name_or_path: the recipe names none, pass --model_name_or_path")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=settings.model_revision)
    except Exception as error:  # OSError, ValueError and what hub clients and parsers raise: all mean the same here
        text = " ".join(str(error).split())[:200].rstrip(".")
        raise BadInput(
            f"{name}: no tokenizer could be loaded ({type(error).__name__}: {text}): where the hub cannot be reached, "
            "pass a local folder as --model_name_or_path or set HF_ENDPOINT to a mirror"
        ) from None
    if not tokenizer.is_fast:
        raise BadInput(f"{name}: its tokenizer does not tell where tokens stand in the text: pass a model with a "
                       "tokenizer.json")  # fmt: skip
    if settings.eos_token is not None:
        if settings.eos_token not in tokenizer.get_vocab():
            raise BadInput(f"eos_token {settings.eos_token}: {name} has no such token, pass one of its own")
        tokenizer.eos_token = settings.eos_token
    return tokenizer


def load_template(settings, tokenizer=None):
    """The text of the chat template: that of the recipe's file, else of the tokenizer; None where there is neither.
    Raises BadInput."""
    path = settings.chat_template_path
    template, where = getattr(tokenizer, "chat_template", None), f"the template of {settings.model_name_or_path}"
    if path is not None:
        where = path
        if not Path(path).is_file() or not path.endswith((".jinja", ".j2")):
            raise BadInput(f"{path}: no such template: pass a .jinja file of chat_templates/ as --chat_template_path")
        template = Path(path).read_text(encoding="utf-8")
    if template is None:
        return None
    if not isinstance(template, str):
        raise BadInput(f"{where}: several templates by name: pass one .jinja file as --chat_template_path")
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=template)  # compiles it and renders nothing
    except TemplateSyntaxError as error:
        raise BadInput(f"{where}:{error.lineno}: not a template ({error.message}): mend it") from None
    return template


class Against:
    """What rows are rendered with, either of it None where there is none: template, tokenizer. marked: whether the
    template has {% generation %} markers; control: pattern of the tokens that must not stand in text, which are those
    of the tokenizer or, without one, those of the known families."""

    def __init__(self, template=None, tokenizer=None):
        self.template, self.tokenizer, self.control = template, tokenizer, CONTROL
        self.lang, self.max_length = (), None  # what check.py is asked to hold rows against
        self.marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template or ""))
        self.names, self.program, self.widths, self.prepared = {"bos_token": "", "eos_token": ""}, None, None, None
        if tokenizer is not None:
            self.names = tokenizer.special_tokens_map
            # as transformers' sanitize_control_tokens sees it (special tokens, and the added ones that the template
            # writes), and what every row of this house is checked for; not the HTML tags and newlines that Gemma adds
            added, told = tokenizer.added_tokens_decoder.values(), template or ""
            tokens = {t.content for t in added if t.special or t.content in told or CONTROL.fullmatch(t.content)}
            tokens = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
            self.control = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        # one of these stands in every control token: finding it is ten times as fast as the pattern
        self.firsts = MARKS if tokenizer is None else sorted({token[0] for token in tokens})

    def control_in(self, value):
        """The first control token in any string of a JSON value, or None."""
        if isinstance(value, str):
            hit = any(first in value for first in self.firsts) and self.control.search(value)
            return hit[0] if hit else None
        return next(filter(None, map(self.control_in, strings(value))), None)

    def render(self, row, messages, prompt=False):
        """(text, trained [start, end) spans of its characters) of messages with the row's tools and template arguments,
        as apply_chat_template renders them for TRL. Raises Refused with the template's words."""
        from transformers.utils.chat_template_utils import _alias_reasoning_fields, render_jinja_template

        try:
            # what is null in a message is dropped, and what the row says wins over the special tokens
            messages = [{key: value for key, value in turn.items() if value is not None} for turn in messages]
            names, tools = {**self.names, **(row.get("chat_template_kwargs") or {})}, tools_of(row)
            if PLAIN_ONLY & {*names} or not all(isinstance(tool, dict) for tool in tools or ()):
                texts, spans = render_jinja_template(
                    [messages],
                    tools=tools,
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self.marked and not prompt,
                    **names,
                )
                return texts[0], spans[0] if spans else []
            # a row is JSON, which render_jinja_template copies part by part to be sure that it is; the rest is the same
            self.program = self.program or quick_program(self.template)
            pieces, spans = [], []
            track = self.program.environment.activate_tracker(pieces, spans)
            with track if self.marked and not prompt else nullcontext():
                shown = {"messages": _alias_reasoning_fields(messages), "tools": tools, "documents": None}
                for piece in self.program.generate(**shown, add_generation_prompt=prompt, **names):
                    pieces.append(piece)
            return "".join(pieces), spans
        except Exception as error:  # a template is a program: it may fail in any way
            raise Refused("template refuses the row", reason_of(error)) from None

    def encode(self, texts, chat):
        """The ids of texts, as the tokenizer's own call gives them, without where they stand in the text."""
        backend = self.tokenizer.backend_tokenizer
        if backend is not self.prepared:
            backend.no_padding()
            backend.no_truncation()
            self.prepared = backend
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        normalizer = backend.normalizer
        composed = type(normalizer).__name__ == "NFC" and all(is_normalized("NFC", text) for text in texts)
        if composed:
            backend.normalizer = None  # it would change nothing, in a twentieth of the time
        try:
            return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=not chat)]
        finally:
            if composed:
                backend.normalizer = normalizer

    def char_to_token(self, text, ids, chars):
        """Encoding.char_to_token of a text's ids, for the edges of these spans, from the bytes that each token stands
        for; None where these do not add up to the text's."""
        self.widths = widths_of(self.tokenizer) if self.widths is None else self.widths
        ends = self.widths.take(ids).cumsum() if len(self.widths) and ids else [-1]
        edges = sorted({char for start, end in chars for char in (start, end - 1) if 0 <= char < len(text)})
        if text.isascii():
            places, size = edges, len(text)
        else:
            steps = [len(text[a:b].encode()) for a, b in pairwise([0, *edges, len(text)])]
            *places, size = accumulate(steps)
        if ends[-1] != size:
            return None
        return dict(zip(edges, ends.searchsorted(places, "right").tolist(), strict=True)).get


PLAIN_ONLY = {"messages", "tools", "documents", "add_generation_prompt", "conversations", "chat_template",
              "return_assistant_tokens_mask", "continue_final_message"}  # fmt: skip


# of strings, which hold nothing that the sandbox would refuse; not format, which it replaces
STRING_METHODS = {"endswith", "lower", "lstrip", "replace", "rstrip", "split", "startswith", "strip", "upper"}


@cache
def quick_program(template):
    """The template as transformers compiles it, with a shorter way to attributes and to methods of strings: jinja's
    sandbox asks Python first and then six questions about the answer, of which dicts, strings, namespaces and loop
    variables need none. Also to namespaces and {% generation %} blocks, which go through four calls each."""
    from jinja2.runtime import LoopContext
    from transformers.utils.chat_template_utils import _compile_jinja_template

    program = _compile_jinja_template.__wrapped__(template)  # one of its own: the cached one is transformers'
    environment, names_of_dict, missing = program.environment, {*dir(dict)}, object()
    kind_of, method, theirs = type(environment), type("".strip), environment.globals["namespace"]
    generation = next(iter(environment.extensions.values()))._generation_support
    undefined = cache(lambda name: environment.undefined(obj={}, name=name))  # it tells the kind of the object only
    told, attrs = object.__getattribute__, "_Namespace__attrs"

    class Ours(theirs):
        """transformers' namespace, which refuses names with an underscore."""

        def __init__(self, /, *args, **names):
            if args or any([name[:1] == "_" for name in names]):
                theirs.__init__(self, *args, **names)
            else:
                object.__setattr__(self, attrs, names)

        def __setitem__(self, name, value):
            if name[0] == "_":
                theirs.__setitem__(self, name, value)
            told(self, attrs)[name] = value

    def quick(obj, name):
        kind, value = type(obj), missing
        if kind is dict:
            if name not in names_of_dict:
                value = obj.get(name, missing)
                return undefined(name) if value is missing else value
        elif kind is LoopContext:
            if name[0] != "_":
                value = getattr(obj, name, missing)
        elif kind is Ours:
            value = told(obj, attrs).get(name, missing)
        elif kind is str and name in STRING_METHODS:
            return getattr(obj, name)
        return kind_of.getattr(environment, obj, name) if value is missing else value

    def call(context, obj, /, *args, _block_vars=None, _loop_vars=None, **kwargs):
        if obj is Ours or type(obj) is method and type(obj.__self__) is str:
            return obj(*args, **kwargs)
        if generation == obj:
            return obj(context.eval_ctx, kwargs["caller"]._func)  # the block is a macro without arguments
        return kind_of.call(environment, context, obj, *args, _block_vars=_block_vars, _loop_vars=_loop_vars, **kwargs)

    for name in ("__module__", "__name__", "__qualname__"):  # which errors tell
        setattr(Ours, name, getattr(theirs, name))
    environment.globals["namespace"] = Ours
    program.globals = {**program.globals}  # every rendering copies it, and it was a chain of dicts
    environment.getattr, environment.call = quick, call
    return program


def widths_of(tokenizer):
    """The bytes of text that each id stands for, in a byte-level tokenizer; an empty array for any other, and where the
    tokenizer trims blanks off the places that it tells."""
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    backend = tokenizer.backend_tokenizer
    settings = json.loads(backend.to_str())
    steps = [settings["pre_tokenizer"], settings["post_processor"]]
    while nested := [step for step in steps if step and {"pretokenizers", "processors"} & {*step}]:
        steps = [step for step in steps if step not in nested]
        steps += [inner for step in nested for inner in step.get("pretokenizers", step.get("processors"))]
    trimmed = settings["post_processor"] and '"trim_offsets": true' in json.dumps(settings["post_processor"])
    whole = settings["normalizer"] is None or settings["normalizer"]["type"] == "NFC"
    if trimmed or not whole or settings["model"]["type"] != "BPE":
        return np.zeros(0, np.int64)
    if not any(step and step["type"] == "ByteLevel" for step in steps):
        return np.zeros(0, np.int64)
    letters, added = {*ByteLevel.alphabet()}, backend.get_added_tokens_decoder()
    widths = np.full(backend.get_vocab_size() + len(added), -(1 << 40), np.int64)  # a sum with one of these never fits
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        if {*token} <= letters:
            widths[number] = len(token)
    for number, token in added.items():
        widths[number] = len(token.content.encode())
    return widths


def reason_of(error):
    """What a template, or a row that is no chat, failed on."""
    said = " ".join(str(getattr(error, "detail", error)).split()) or type(error).__name__
    if isinstance(error, KeyError):
        return f"it lacks {said}"
    known = isinstance(error, ValueError) and not isinstance(error, UnicodeError)
    return said if known or "Template" in type(error).__name__ else f"{type(error).__name__}: {said}"


def load_against(settings, lenient=False, told=True):
    """Against of a recipe's settings. lenient: without a tokenizer where none is at hand, which is told. Raises
    BadInput."""
    tokenizer = None
    if settings.model_name_or_path or not lenient:
        try:
            tokenizer = load_tokenizer(settings)
        except BadInput as error:
            if not lenient:
                raise
            if told:
                print(f"known control tokens are looked for, not the tokenizer's own: {error}", file=sys.stderr)
    return Against(load_template(settings, tokenizer), tokenizer)


# -- one row ----------------------------------------------------------------------------------------------------------
def control_tokens(row, against):
    """Yield (place, token): the first control token that stands in the text of each message and tool."""
    for name, parts in (("message", turns_of(row)), ("tool", tools_of(row) or [])):
        for number, part in enumerate(parts):
            for key, value in part.items():
                if key != "role" and (hit := against.control_in(value)):
                    yield f"{name} {number}", hit
                    break


def lost_personas(row, against):
    """Yield (place, text) of each persona (system message, or argument of the template) that the rendered text leaves
    out, as SmolLM3's own did for custom_instructions=None. Each is rendered with a mark behind it: its text alone might
    stand in the default persona, or in what the user says, and the row would pass though the template drops it."""
    turns, kwargs = turns_of(row), row.get("chat_template_kwargs") or {}
    given = {name: kwargs.get(name) for name in PERSONAS}
    given |= {f"message {n}": t.get("content") for n, t in enumerate(turns) if t.get("role") in ("system", "developer")}
    given = {place: text for place, text in given.items() if isinstance(text, str) and text.strip()}
    if not given:
        return
    marked = {place: f"{text} persona{number}mark" for number, (place, text) in enumerate(given.items())}
    turns = [{**turn, "content": marked.get(f"message {n}", turn.get("content"))} for n, turn in enumerate(turns)]
    names = {place: text for place, text in marked.items() if place in kwargs}
    try:
        text, _ = against.render({**row, "chat_template_kwargs": kwargs | names}, turns)
    except Refused:
        return  # told where the row itself is rendered
    for place, expected in marked.items():
        if spoken(expected) not in spoken(text):
            yield place, given[place]


def spoken(text):
    """Text without the switches that a template takes out of a persona and without a difference of blanks."""
    return " ".join(re.sub(r"/(?:no_think|think|system_override)\b", " ", text).split())


# -- rows in and out --------------------------------------------------------------------------------------------------
def load_sets(path, split="train"):
    """What datasets makes of a save_to_disk folder (a Dataset, or {split: Dataset}) or of a file ({split: Dataset}), as
    recipes load it. Raises BadInput."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is in the one sentence below
    kind = path.suffix[1:].replace("jsonl", "json")
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder: pass .jsonl, .json, .parquet or a save_to_disk folder")
    if path.is_file() and kind not in ("json", "parquet"):
        raise BadInput(f"{path}: unknown kind of file: pass .jsonl, .json, .parquet or a save_to_disk folder")
    if path.is_file() and path.stat().st_size < 1000 and not path.read_bytes().strip():
        raise no_rows(path)
    try:
        if path.is_dir():
            sets = datasets.load_from_disk(str(path))
        else:
            sets = datasets.load_dataset(kind, data_files={split: str(path)})
        for one in sets.values() if isinstance(sets, dict) else [sets]:
            for column in one.data.columns:
                column.validate(full=True)  # Arrow takes bytes that are no UTF-8 and stumbles when a row is read
    except Exception as error:  # datasets wraps what pyarrow, fsspec and its own readers raise
        raise unreadable(path, error) from None
    return sets


def no_rows(path):
    return BadInput(f"{path}: no rows: pass rows of messages (data_prep/normalize.py makes them)")


def unreadable(path, error):
    """A BadInput that says where a file is broken, as exactly as can be told."""
    cause = " ".join(str(error.__cause__ or error).split())[:200].rstrip(".")
    fault = f": cannot be read ({type(error).__name__}: {cause})"
    for number, row in read_rows(path) if path.is_file() and path.suffix != ".parquet" else ():
        try:
            if isinstance(row, Refused):
                raise row
            refuse_half_pairs(row)
        except Refused as refusal:
            fault = f":{number}: {refusal}"
            break
    return BadInput(f"{path}{fault}: mend it or make it anew (data_prep/normalize.py, save_to_disk)")


def read_prompt(row):
    """The recipes' read_prompt."""
    turns = row.get("messages") or row.get("prompt")
    if not isinstance(turns, list):
        return str(turns or row.get("text") or row.get("input_ids"))
    asked = " ".join(str(turn.get("content")) for turn in turns if turn.get("role") != "assistant")
    return " ".join(SWITCH.sub("", asked).split())


def split_by_prompt(rows, eval_rows, seed):
    """(train, validation): the positions of the rows that the recipes' split_by_prompt draws (tests/test_preview.py
    holds both equal); nothing held out where it would stop."""
    import numpy as np

    prompts = [hash(read_prompt(row)) for row in rows]
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    held_out = set()
    rows_left = eval_rows
    for prompt, size in Counter(prompts[number] for number in order).items():
        if size <= rows_left:
            held_out.add(prompt)
            rows_left -= size
    train = [number for number in order if prompts[number] not in held_out]
    validation = [number for number in order if prompts[number] in held_out]
    return (train, validation) if train else (order, [])


def load_rows(data, settings):
    """(rows, order, note): the train split as recipes load it, the rows that are trained in the order in which they
    reach the packing, and one sentence where that is not all of them. The row itself is what datasets gives back, with
    the nulls that Arrow fills in, because that is what a template gets to see. Raises BadInput."""
    import numpy as np

    split, settings.data = settings.dataset_train_split, f"{data}: "
    sets = load_sets(Path(data), split)
    if not isinstance(sets, dict):
        raise BadInput(f"{data}: one set without splits: save a DatasetDict with a {split} split")
    if split not in sets:
        raise BadInput(f"{data}: no split {split}, only {', '.join(sets)}: pass one of them as --dataset_train_split")
    rows = sets[split]
    if not len(rows):
        raise no_rows(data)
    if not {"messages", "prompt", "text", "input_ids"} & {*rows.column_names}:
        raise BadInput(
            f"{data}: rows of {', '.join(rows.column_names)} are no messages: data_prep/normalize.py makes them"
        )
    if "messages" in rows.column_names and not isinstance(rows[0]["messages"], list):
        # also what datasets makes of a file that Arrow cannot read: every message a row
        raise unreadable(Path(data), TypeError("messages are no list"))
    order, note = [*range(len(rows))], ""
    if settings.dataset_test_split not in sets and settings.eval_rows:
        trained, validation = split_by_prompt(rows, settings.eval_rows, settings.seed)
        if not validation:
            note = f"the recipe holds out {settings.eval_rows} rows for validation, more than the set can spare: it "
            note += "would stop; counted without that (--eval_rows 0)"
        else:
            order = trained
            note = f"{len(validation):,} rows are held out for validation (eval_rows): packs and steps are those of "
            note += f"the other {len(order):,}"
    if settings.shuffle_dataset and "input_ids" not in rows.column_names:
        order = [order[i] for i in np.random.default_rng(settings.seed).permutation(len(order)).tolist()]
    return rows, order, note


# -- tokens and mask --------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Document:
    """One row as the trainer gets it, before anything is cut."""

    number: int  # from 0
    row: dict
    ids: list
    spans: list  # trained tokens as [start, end), in order, apart from each other
    text: str | None = None  # what was rendered; None in a compiled row
    chars: list = field(default_factory=list)  # trained characters of the text, one span a {% generation %} block
    encoding: object = None  # tokenizers.Encoding, which knows where the tokens stand in the text, where asked for

    def mask(self):
        """0 or 1 a token, as transformers gives assistant_masks."""
        mask = [0] * len(self.ids)
        for start, end in self.spans:
            mask[start:end] = [1] * (end - start)
        return mask

    def trained(self, start=0, end=math.inf):
        """Trained tokens within [start, end)."""
        return within(self.spans, start, end)


def within(spans, start, end):
    """Tokens of the spans within [start, end)."""
    return sum(max(0, min(b, end) - max(a, start)) for a, b in spans)


def runs(mask):
    """[start, end) of every run of true values."""
    spans = []
    for index, value in enumerate(mask):
        if value and spans and spans[-1][1] == index:
            spans[-1][1] = index + 1
        elif value:
            spans.append([index, index + 1])
    return spans


def token_spans(char_to_token, chars, length):
    """Token spans of character spans, by transformers' own rules (apply_chat_template with
    return_assistant_tokens_mask), its quirks included: a token across an edge is trained whole, a span that starts
    nowhere ends the search, and one that ends nowhere, or at token 0, trains all that follows."""
    spans = []
    for start_char, end_char in chars:
        start, end = char_to_token(start_char), char_to_token(end_char - 1)
        if start is None:
            break
        end = end + 1 if end else length
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        elif end > start:
            spans.append([start, end])
    return spans


def conversational(value):
    """Whether TRL takes the value for messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def is_chat(first, against, settings):
    """Whether the rows are chats, by the first of them. Raises BadInput where they, or the template, do not fit."""
    chat = conversational(first.get("messages", first.get("prompt")))
    if settings.assistant_only_loss and "input_ids" not in first:
        if not chat:
            raise BadInput(f"{settings.data}the rows are no chats, and assistant_only_loss needs chats: pass rows of "
                           "messages, or --assistant_only_loss false")  # fmt: skip
        if not against.marked:
            where = settings.chat_template_path or f"the template of {settings.model_name_or_path}"
            raise BadInput(f"{where}: has no {{% generation %}} markers, so nothing would be trained: pass one of "
                           "chat_templates/ as --chat_template_path")  # fmt: skip
    if chat and against.template is None:
        raise BadInput(f"{settings.model_name_or_path}: has no chat template: pass one as --chat_template_path")
    return chat


def documents(rows, against, settings, progress=None, encodings=True):
    """Yield a Document a row, in order; progress(count) is told of rows done; encodings=False: without encoding, which
    is faster. Rows that cannot be rendered end it with a BadInput that counts them."""
    first = next(iter(rows), None)
    if first is None:
        return
    chat = is_chat(first, against, settings)
    failed, numbered = [], enumerate(rows)
    while batch := list(islice(numbered, MAP_BATCH)):
        if "input_ids" in first:
            docs = [compiled(number, row, settings) for number, row in batch]
        else:
            docs = tokenised(batch, against, settings, chat, failed, encodings)
        yield from docs
        if progress:
            progress(len(batch))
    if failed:
        number, row, reason = failed[0]
        where = settings.data + name_of(number, row) + (f" and {len(failed) - 1:,} more" if failed[1:] else "")
        raise BadInput(f"{where} cannot be rendered: {reason}")


def name_of(number, row):
    return f"row {number}" + (f" (id {row['id']})" if row.get("id") not in (None, "") else "")


def compiled(number, row, settings):
    """Document of a row that has its ids: trained is what TRL builds labels of, from labels, else masks, else all.
    Raises BadInput."""
    ids, here = row["input_ids"], settings.data + name_of(number, row)
    if not isinstance(ids, list):
        raise BadInput(f"{here}: input_ids is no list: compile the set anew")
    names = ["completion_mask"] * bool(settings.completion_only_loss) + ["assistant_masks"]
    masks = [row[name] for name in names if name in row]
    if "labels" in row:
        masks = [[label != -100 for label in row["labels"]]]
    if any(len(mask) != len(ids) for mask in masks):
        raise BadInput(f"{here}: as many labels as input_ids are needed: compile the set anew")
    return Document(number, row, ids, runs(map(all, zip(*masks, strict=True))) if masks else runs([1] * len(ids)))


def tokenised(batch, against, settings, chat, failed, encodings=True):
    """Documents of a batch of (number, row), tokenised in one call; rows that fail are added to failed."""
    tokenizer, paired = against.tokenizer, "prompt" in batch[0][1]
    completion_only = settings.completion_only_loss
    if completion_only is None:
        completion_only = paired and "completion" in batch[0][1]
    done, texts, prompts = [], [], []
    for number, row in batch:
        try:
            if row.get("chat_template_kwargs", {}) is None:
                raise ValueError("chat_template_kwargs is null, and TRL stops at that: write {} in every row")
            if chat:
                turns = row["prompt"] + row["completion"] if paired else row["messages"]
                if not turns:
                    raise ValueError("it has no messages: leave it out")
                text, chars = against.render(row, turns)
                prompt = against.render(row, row["prompt"], prompt=True)[0] if paired else ""
            else:
                key = "completion" if paired else settings.dataset_text_field
                ending = "" if row[key].endswith(tokenizer.eos_token or "") else tokenizer.eos_token
                text, chars, prompt = (row["prompt"] if paired else "") + row[key] + ending, [], row.get("prompt", "")
            text.encode()  # half a surrogate pair is no text
        except Exception as error:
            failed.append((number, row, reason_of(error)))
            continue
        done.append((number, row, text, chars if settings.assistant_only_loss else []))
        texts.append(text)
        prompts.append(prompt)
    if not texts:
        return []
    plain = {"add_special_tokens": not chat, "return_attention_mask": False}
    found, whole, starts = [None] * len(texts), None, [0] * len(texts)
    if encodings:
        encoded = tokenizer(texts, **plain)
        whole, found = encoded["input_ids"], encoded.encodings
    else:
        whole = against.encode(texts, chat)
    if paired:  # the completion starts where the prompt's tokens and the whole's diverge
        starts = list(map(common, tokenizer(prompts, **plain)["input_ids"], whole))
    out = []
    for (number, row, text, chars), ids, encoding, start in zip(done, whole, found, starts, strict=True):
        spans = [[0, len(ids)]]
        if settings.assistant_only_loss:
            place = encoding.char_to_token if encoding else against.char_to_token(text, ids, chars)
            spans = token_spans(place or tokenizer(text, **plain).encodings[0].char_to_token, chars, len(ids))
        if completion_only:
            spans = [[max(a, start), b] for a, b in spans if b > start]
        spans = [span for span in spans if span[1] > span[0]]
        out.append(Document(number, row, ids, spans, text, chars, encoding))
    return out


def common(ids, other_ids):
    """Number of leading tokens that both have."""
    pairs = enumerate(zip(ids, other_ids, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(ids), len(other_ids)))


# -- packs ------------------------------------------------------------------------------------------------------------
def pack(lengths, max_length, strategy="bfd", num_proc=None, one_stream=False):
    """The packs that TRL's pack_dataset makes of rows of these lengths (in tokens): a list of packs, each a list of
    pieces (row, start, end), [start, end) the tokens of the row.

    TRL packs within the batches of 1,000 rows that datasets' map hands it, each process its own stretch of rows, so the
    packs of a set are those of its batches, one after the other. one_stream: all rows are one batch."""
    shares = 1 if one_stream else min(num_proc or 1, len(lengths)) or 1
    size, rest = divmod(len(lengths), shares)
    batch_size = (one_stream and len(lengths)) or MAP_BATCH
    packs, start = [], 0
    for share in range(shares):
        stop = start + size + (share < rest)
        for first in range(start, stop, batch_size):
            batch = range(first, min(first + batch_size, stop))
            packs += (wrapped if strategy == "wrapped" else best_fit)(lengths, batch, max_length, strategy)
        start = stop
    return packs


def best_fit(lengths, batch, max_length, strategy):
    """Best fit decreasing: the longest piece first, into the fullest pack that still has room for it, and of equally
    full ones into the one that has been so for longest; else into a new pack. Longer rows are cut (bfd) or split."""
    import pyarrow as pa

    pieces = []
    for row in batch:
        ends = [min(lengths[row], max_length)] if strategy == "bfd" else [*range(max_length, lengths[row], max_length)]
        ends += [lengths[row]] if strategy != "bfd" else []
        starts = [0, *ends[:-1]]
        pieces += [(row, start, end) for start, end in zip(starts, ends, strict=True) if end > start]
    sizes = pa.array([end - start for _, start, end in pieces], pa.int32())
    # by Arrow, as TRL sorts: pieces of one length must come in the same order too
    ordered = pa.StructArray.from_arrays([sizes, pa.array(range(len(pieces)))], ["0", "1"]).sort("descending", by="0")
    packs, rooms, by_room = [], [], defaultdict(deque)  # rooms: the sorted rooms that packs with space have
    for size, index in zip(ordered.field(0).to_pylist(), ordered.field(1).to_pylist(), strict=True):
        place = bisect.bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            chosen = by_room[room].popleft()
            if not by_room[room]:
                rooms.pop(place)
        else:
            room, chosen = max_length, []
            packs.append(chosen)
        chosen.append(pieces[index])
        if room > size:
            if not by_room[room - size]:
                bisect.insort(rooms, room - size)
            by_room[room - size].append(chosen)
    return packs


def wrapped(lengths, batch, max_length, strategy):
    """One stream of the batch's tokens, cut every max_length tokens."""
    packs, room = [], 0
    for row in batch:
        start = 0
        while start < lengths[row]:
            if not room:
                packs.append([])
                room = max_length
            end = min(lengths[row], start + room)
            packs[-1].append((row, start, end))
            room, start = room - (end - start), end
    return packs


def steps(units, settings):
    """(optimizer steps of an epoch, of the run) over `units` packs or rows, on any number of processes, as the Trainer
    of transformers counts them: a last batch and a last accumulation that are not full are steps too."""
    passes = math.ceil(units / settings.per_device_train_batch_size)
    accumulation = settings.global_batch_size // settings.per_device_train_batch_size
    epoch = max(1, math.ceil(passes / accumulation))
    return epoch, settings.max_steps if settings.max_steps > 0 else math.ceil(settings.num_train_epochs * epoch)
