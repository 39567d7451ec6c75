"""The fast path to tokens and mask."""

import json
from functools import cache

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
