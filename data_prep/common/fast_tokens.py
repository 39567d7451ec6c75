"""THE FAST PATH of tokens.py: the same ids and mask as apply_chat_template gives, at two to four times its speed.

Everything here may be deleted: tokens.py then takes its plain path, and so it does by itself where `missing_name` finds
that a name is gone. tests/data_prep/test_tokens.py holds both paths equal. Three things take less time here:
  templates  jinja's sandbox asks Python for an attribute and then six questions about the answer. Keys of dicts, loop
             variables and namespaces need none of them: `speed_up` answers for these, in the template that transformers
             keeps compiled (jinja's and transformers' private names)
  tokens     the tokenizers library encodes whole batches, without where the tokens stand in the text
  mask       a byte-level token stands for as many bytes as it has letters, so that sums tell where it stands
"""

import json
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from .rendering import Renderer, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE_NAMES = {  # where it is defined: what for
    "transformers.utils.chat_template_utils._compile_jinja_template": "called: the compiled template, which it keeps",
    "jinja2.utils.Namespace._Namespace__attrs": "read: the values of a namespace",
}
UNFIT = -(1 << 40)  # bytes of a token that stands for no bytes of its own: no sum with one of these fits


def missing_name() -> str | None:
    """Return why the fast path cannot be taken, or None: a name that it needs is gone."""
    try:
        from transformers.utils import chat_template_utils

        environment = chat_template_utils._compile_jinja_template("").environment
        object.__getattribute__(environment.globals["namespace"](), "_Namespace__attrs")
    except (ImportError, AttributeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@lru_cache(maxsize=4)
def open_fast_path(renderer: Renderer) -> "FastPath | None":
    """Return the fast path of a renderer, None where a name that it needs is gone."""
    if missing_name() is not None:
        return None
    return FastPath(renderer)


# -- templates --------------------------------------------------------------------------------------------------------
def speed_up(template: str) -> None:
    """Give transformers' compiled template a shorter way to keys of dicts, loop variables and namespaces."""
    from jinja2.runtime import LoopContext
    from transformers.utils import chat_template_utils

    environment = chat_template_utils._compile_jinja_template(template).environment
    namespace = environment.globals["namespace"]
    slow_getattr = type(environment).getattr
    dict_methods = set(dir(dict))
    loop_names = {name for name in dir(LoopContext) if not name.startswith("_")}

    def fast_getattr(value: object, name: str) -> object:
        kind = type(value)
        if kind is dict:
            if name in value and name not in dict_methods:
                return value[name]
        elif kind is LoopContext:
            if name in loop_names:
                return getattr(value, name)
        elif kind is namespace:
            names = object.__getattribute__(value, "_Namespace__attrs")
            if name in names:
                return names[name]
        return slow_getattr(environment, value, name)

    environment.getattr = fast_getattr


# -- tokens and mask --------------------------------------------------------------------------------------------------
class FastPath:
    """Encodes texts, and finds the tokens of characters, for one renderer."""

    def __init__(self, renderer: Renderer) -> None:
        if renderer.template is not None:
            speed_up(renderer.template)
        self.tokenizer = renderer.tokenizer
        self.widths = token_widths(self.tokenizer)

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the ids of texts, as the tokenizer's own call gives them."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    def find_tokens(self, text: str, ids: list[int], chars: list[Span]) -> Callable[[int], int | None] | None:
        """Return Encoding.char_to_token for the edges of these spans; None where the bytes that the tokens stand for
        do not add up to the text's."""
        if self.widths is None or not ids:
            return None
        ends = self.widths.take(ids).cumsum()
        edges = {char for start, end in chars for char in (start, end - 1) if 0 <= char < len(text)}
        edges = sorted(edges)
        if text.isascii():
            places = edges
            size = len(text)
        else:
            steps = [len(text[start:end].encode()) for start, end in pairwise([0, *edges, len(text)])]
            *places, size = accumulate(steps)
        if ends[-1] != size:
            return None
        return dict(zip(edges, ends.searchsorted(places, "right").tolist(), strict=True)).get


def token_widths(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray | None:
    """Return the bytes of text that each id stands for, (vocabulary,) int64, in a byte-level tokenizer.

    None for any other, and where the tokenizer trims blanks off the places that it gives.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    backend = tokenizer.backend_tokenizer
    definition = json.loads(backend.to_str())
    trims = '"trim_offsets": true' in json.dumps(definition["post_processor"])
    keeps_bytes = definition["normalizer"] is None or definition["normalizer"]["type"] == "NFC"
    is_byte_level = '"type": "ByteLevel"' in json.dumps([definition["pre_tokenizer"], definition["post_processor"]])
    if trims or not keeps_bytes or not is_byte_level or definition["model"]["type"] != "BPE":
        return None
    letters = set(ByteLevel.alphabet())
    added = backend.get_added_tokens_decoder()
    widths = np.full(backend.get_vocab_size() + len(added), UNFIT, np.int64)
    for token, number in backend.get_vocab(with_added_tokens=False).items():
        if set(token) <= letters:
            widths[number] = len(token)
    for number, token in added.items():
        widths[number] = len(token.content.encode())
    return widths
