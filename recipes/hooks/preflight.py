"""Hook: what would waste a run without a word is refused before it is paid for, or counted in one line at its start.

Packing that lets documents see each other, pairs of method and engine that do not work, full fine-tuning without fp32
weights, packs with nothing to train, answers cut off, personas that the template drops. What can be asked for by
`--allow NAME` stands in ALLOW.
"""

import copy
import hashlib
import json
import os
import re
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from accelerate import ParallelismConfig
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

SHARE = 0.01  # of packs or rows: a fault in more of them is refused, as by data_prep/preview.py --max_cut
ALLOW = {
    "bf16_weights": "full fine-tuning of bf16 or fp16 weights without fp32 master weights",
    "masked_packs": f"more than {SHARE:.0%} of the packs hold nothing to train",
    "lost_personas": "rows whose system message or custom_instructions the template leaves out of the text",
    "cut_answers": f"more than {SHARE:.0%} of the rows are cut within what is trained",
    "qlora_fsdp2": "QLoRA on FSDP2: right on CPUs with --bnb_4bit_quant_storage bfloat16 --optim adamw_torch",
    "other_tokenizer": "a compiled set (data_prep/compile.py) of another tokenizer, template or mask",
    "other_run": "resuming what another recipe, template, tokenizer or data began",
}
PAIRS = {  # (method, engine): the name in ALLOW, why not
    ("QLoRA", "FSDP2"): ("qlora_fsdp2", "4-bit weights stay whole on every GPU or fail (accelerate#3874)"),
}
NO_CLASS = {  # model type that transformers has as a config only: what else is missing
    "step3p5": "upstream trained it with pipeline, context and expert parallelism, which TRL has not; its optimizer "
    "and schedule run on Qwen3 (recipes/step35_sft.py without this config)",
}
# share of what two documents joined to one would do, above which packing leaks. On a CPU, over every architecture that
# transformers 5.23 builds from its default config: noise at most 6e-6 in fp32 and 0.044 in bf16, leaks from 0.045 on
LEAK = {torch.float32: 1e-3, torch.bfloat16: 0.1}
PERSONAS = ("custom_instructions", "system_prompt", "model_identity")  # template arguments that say who speaks
LENGTH, VOCABULARY, LARGEST = 20, 64, 5e8  # of the probe: tokens of a document, ids, parameters
LOADED = re.compile(r"[^/]+\.(safetensors|json|jinja|txt|model)")  # what of a model's files is loaded
RUN = {}  # what prepare() was given


# -- packing: two documents in a pack against each alone, in a small random model of the same config ------------------
def shrunk(config, narrow):
    """A copy of the config that costs next to nothing and takes the same paths through the model's code.

    Kept: as many first layers as show every kind of layer, at least two; head_dim; query heads to a key head. With
    narrow=False also the widths of the attention, for models in which they hang together in other ways.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers

    def field(name):
        try:
            return getattr(text, name, None)
        except Exception:  # some configs refuse to name what differs between layers
            return None

    properties = "layer_types", "layers_block_type"  # of some configs
    lists = {name: field(name) for name in (*vars(text), *properties)}
    lists = {name: x for name, x in lists.items() if isinstance(x, (list, tuple)) and len(x) == depth}
    kinds = [str([x[layer] for x in lists.values()]) for layer in range(depth)]
    layers = min(depth, max(2, 1 + max(map(kinds.index, kinds))))
    small = {name: x[:layers] for name, x in lists.items() if name in vars(text)}
    small |= {"num_hidden_layers": layers} | ({"pad_token_id": 0} if field("pad_token_id") is not None else {})
    # every expert is chosen, so that rounding cannot choose another; a window shorter than a document matters
    for value, names in {
        VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
        32: ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
        8: ("sliding_window", "attention_chunk_size"),
        2: ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok", "moe_k"),
        1: ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"),
    }.items():
        small |= {name: value for name in names if field(name)}
    if narrow and (heads := field("num_attention_heads")):
        keys = field("num_key_value_heads")
        group = heads // (keys or heads)
        small |= {"num_attention_heads": group, "hidden_size": text.hidden_size * group // heads}
        small |= {"num_key_value_heads": 1} if keys else {}
    for name, value in small.items():
        setattr(text, name, value)
    for part in (getattr(config, name, None) for name in config.sub_configs):
        if part is not None and part is not text:  # towers for images or sound
            vars(part).update({name: 1 for name in ("num_hidden_layers", "depth") if name in vars(part)})
    return config


def build(config, attention, device, dtype, remote):
    """The model without its head (TRL's fused loss runs just that), weights of std 1 / sqrt(inputs): a leak shows."""
    config._attn_implementation = attention
    # by its class: from_config() would shard it under ZeRO-3
    make = getattr(transformers, (config.architectures or [""])[0], None) or MODEL_FOR_CAUSAL_LM_MAPPING.get(
        type(config), lambda config: AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
    )
    with torch.device("meta"):
        size = sum(weight.numel() for weight in make(config).parameters())
    if size > LARGEST:
        raise ValueError(f"even the smallest model that shows its kinds of layers has {size / 1e9:.1f}B parameters")
    model = make(config).to(device, dtype).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model.base_model


@torch.no_grad()
def leak(config, attention, device, remote=False):
    """(gap, joined, limit): the largest difference of a hidden state (about 1 in size) between two packed documents
    and each alone; between the two joined to one document and each alone, as no separation at all would give; and the
    gap above which it is a leak.

    ValueError: no probe can be built. RuntimeError: packed rows fail where the same rows alone do not.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the run's random numbers stay as they are
        torch.manual_seed(0)
        ids = torch.randint(3, VOCABULARY, (2, LENGTH))
        pack = {"input_ids": ids.flatten().tolist(), "seq_lengths": [LENGTH, LENGTH]}
        pack = DataCollatorForLanguageModeling(0, padding_free=True)([pack])
        del pack["labels"]
        reasons = []
        for dtype, narrow in product(LEAK, (True, False)):  # bf16 for flash attention, which takes no fp32
            try:
                model = build(shrunk(config, narrow), attention, device, dtype, remote)

                def run(model=model, **inputs):
                    inputs = {name: x.to(device) if torch.is_tensor(x) else x for name, x in inputs.items()}
                    return model(**inputs, use_cache=False).last_hidden_state.float().view(2, LENGTH, -1)

                alone, joined = run(input_ids=ids), run(input_ids=ids.view(1, -1))
                break
            except Exception as error:  # a model's code may raise anything
                reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:200])
        else:
            raise ValueError(reasons[0])
        joined = (joined - alone).abs().max().item()
        if not joined > 0.01:
            raise ValueError("tokens of a random model of it do not see each other")
        try:
            return (run(**pack) - alone).abs().max().item(), joined, LEAK[dtype] * joined
        except Exception as error:
            raise RuntimeError(" ".join(str(error).split()).rstrip(".")) from error
        finally:
            if attention == "flex_attention":
                torch._dynamo.reset()  # shapes compiled here would count towards the limit of the run


def check_packing(args, model):
    RUN["probed"] = True
    attention = args.model_init_kwargs["attn_implementation"]
    config = AutoConfig.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code
    )
    what, mend = f"{config.model_type} with {attention} attention", "--packing false, or another --attn_implementation"
    try:
        gap, joined, limit = leak(config, attention, args.device, args.trust_remote_code)
    except ValueError as error:
        return say(args, f"packing of {what} not probed: {error}")
    except RuntimeError as error:
        raise ValueError(f"packing: {what} cannot take packed rows ({error}): {mend}") from None
    if not gap <= limit:
        raise ValueError(
            f"packing: {what} lets documents in one pack see each other: hidden states are off by {gap:.2g}, and by "
            f"{joined:.2g} with nothing between them: {mend}; --packing_strategy wrapped mixes documents by choice"
        )


# -- engine and weights -----------------------------------------------------------------------------------------------
def engine(args):
    """What accelerate makes of the launcher's settings: ZeRO-0 to ZeRO-3, FSDP1, FSDP2, DDP or one process."""
    if args.deepspeed_plugin is not None:
        return f"ZeRO-{args.deepspeed_plugin.zero_stage}"
    kind, own = args.distributed_state.distributed_type.value, args.fsdp_plugin_args
    asked = own is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and kind.startswith("MULTI_") and kind != "MULTI_CPU":  # on CPUs accelerate leaves FSDP out unsaid
        return f"FSDP{own['fsdp_version'] if own else os.environ.get('FSDP_VERSION', '1')}"
    return "DDP" if args.world_size > 1 else "one process"


def check_pair(args, model, allow):
    method = "QLoRA" if model.load_in_4bit or model.load_in_8bit else "LoRA" if model.use_peft else "full fine-tuning"
    if args.packing and ParallelismConfig().sp_size > 1:
        raise ValueError("sequence parallelism trains unpacked rows (DeepSpeed 0.19.8 stops at packs): --packing false")
    name, why = PAIRS.get((method, engine(args)), (None, None))
    if name and name not in allow:
        raise ValueError(
            f"{method} with {engine(args)} does not work: {why}: launch with another --config_file, or --allow {name} "
            f"({ALLOW[name]})"
        )


def check_class(args, model):
    """transformers may know a model as a config only; said here, and not after the data has been read."""
    name, remote = model.model_name_or_path, args.trust_remote_code
    config = AutoConfig.from_pretrained(name, revision=model.model_revision, trust_remote_code=remote)
    known = hasattr(transformers, (config.architectures or [""])[0]) or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known and not (remote and "AutoModelForCausalLM" in getattr(config, "auto_map", ())):
        more = f", and {NO_CLASS[config.model_type]}" if config.model_type in NO_CLASS else ""
        raise ValueError(
            f"{name} cannot be trained here: transformers {transformers.__version__} has a config for "
            f"{config.model_type} but no causal-LM class{more}: another --model_name_or_path"
        )


def check_weights(trainer, model, allow):
    """DeepSpeed's ZeRO keeps fp32 copies of its own; everything else updates the weights as they are."""
    low = {w.dtype for w in trainer.model.parameters() if w.requires_grad} & {torch.bfloat16, torch.float16}
    zero = trainer.args.deepspeed_plugin is not None and trainer.args.deepspeed_plugin.zero_stage > 0
    if low and not (zero or model.use_peft or "bf16_weights" in allow):
        raise ValueError(
            f"full fine-tuning of {str(low.pop())[6:]} weights drops small updates: --dtype float32 keeps fp32 master "
            "weights and computes in bf16 as before, --allow bf16_weights trains them as they are"
        )


# -- a compiled set ---------------------------------------------------------------------------------------------------
def check_compiled(script, args, model):
    """Ids mean nothing to another tokenizer, a mask is its template's: what a set's report says against the run's."""
    report = Path(script.dataset_name) / "report.json"
    told = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    if told.get("script") != "compile.py" or "other_tokenizer" in script.allow:
        return
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    tokenizer.eos_token = args.eos_token or tokenizer.eos_token
    said = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    text = Path(args.chat_template_path).read_text(encoding="utf-8")
    own = {
        "tokenizer": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest(),
        "template": hashlib.sha256(text.encode()).hexdigest(),
        "kwargs": {"assistant_only_loss": args.assistant_only_loss, "special_tokens": tokenizer.special_tokens_map},
    }
    if other := [name for name in own if own[name] != told.get(name)]:
        raise ValueError(
            f"{script.dataset_name}: compiled with another {' and '.join(other)} than this recipe's: compile it anew "
            "(data_prep/compile.py), or --allow other_tokenizer"
        )


# -- counts at start --------------------------------------------------------------------------------------------------
def documents(data, column):
    """Yields (values, starts of documents, their ends, ends of rows) for 1,000 rows or packs at a time, as arrays."""
    for part in data.with_format("arrow").iter(1000):
        values, rows = pc.list_flatten(part[column]).to_numpy(), pc.list_value_length(part[column]).to_numpy()
        sizes = pc.list_flatten(part["seq_lengths"]).to_numpy() if "seq_lengths" in data.column_names else rows
        ends = sizes.cumsum()
        yield values, (ends - sizes)[sizes > 0], ends[sizes > 0], rows.cumsum()


def count(trainer):
    """Of the prepared train set: units (packs or rows), tokens, trained tokens, masked units (nothing trained), and
    full documents (of max_length tokens)."""
    data, found = trainer.train_dataset, dict.fromkeys(("units", "tokens", "trained", "masked", "full"), 0)
    for labels, starts, ends, rows in documents(data, "labels" if "labels" in data.column_names else "input_ids"):
        live = labels != -100
        live[starts] = False  # nothing predicts a document's first token
        trained = np.diff(np.append(0, live.cumsum())[np.append(0, rows)])
        full = (ends - starts == (trainer.args.max_length or 0)).sum()
        for name, value in zip(found, (len(rows), len(live), trained.sum(), (trained == 0).sum(), full), strict=True):
            found[name] += int(value)
    return found


def text_bytes(array):
    """Bytes of all text below each element of an Arrow array."""
    if isinstance(array, pa.StructArray):
        return sum(map(text_bytes, array.flatten()), np.zeros(len(array), int))
    if isinstance(array, (pa.ListArray, pa.LargeListArray)):
        below, sizes = text_bytes(array.flatten()), pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        return np.diff(np.append(0, below.cumsum())[np.append(0, sizes.cumsum())])
    if isinstance(array, (pa.StringArray, pa.LargeStringArray)):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy()
    return np.zeros(len(array), int)


@contextmanager
def uncut(trainer):
    """Yields prepare(rows): rows as TRL tokenises and masks them, neither cut nor packed; no bars, no cache files."""
    args, template, path = copy.copy(trainer.args), trainer.chat_template, trainer.args.chat_template_path
    vars(args).update(max_length=None, shuffle_dataset=False, dataset_num_proc=None)
    bars, caching = not datasets.are_progress_bars_disabled(), datasets.is_caching_enabled()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    try:  # the tokenizer's own template has lost its markers by now
        trainer.chat_template = Path(path).read_text(encoding="utf-8") if Path(path or "").is_file() else template
        yield lambda rows: trainer._prepare_dataset(rows, trainer.processing_class, args, False, None, "long")
    finally:
        trainer.chat_template = template
        datasets.enable_progress_bars() if bars else None
        datasets.enable_caching() if caching else None


def cut_rows(trainer, rows, full):
    """(rows that lose trained tokens to max_length, tokens of the longest row), exactly.

    A document of max_length tokens is all that is ever left of a longer row. So `full` of them, and the rows that TRL
    dropped because nothing to train was left, say how many rows to look for; they are looked for among those with most
    text first, tokenised again without a limit.
    """
    args = trainer.args
    wanted = full + (0 if args.packing else len(rows) - len(trainer.train_dataset))
    if not args.max_length or not wanted or args.packing and args.packing_strategy != "bfd":
        return 0, 0  # bfd_split and wrapped lose no token
    table = rows.with_format("arrow")[:]
    order = np.argsort(-sum(text_bytes(column.combine_chunks()) for column in table.columns), kind="stable")
    at, found, cut, longest = 0, 0, 0, 0
    with uncut(trainer) as prepare_rows:
        while found < wanted and at < len(order):
            some = order[at : at + 2 * wanted + 64]
            at += len(some)
            for labels in prepare_rows(rows.select(some))["labels"]:
                end = args.truncation_mode == "keep_end" and not args.packing
                lost = labels[: max(0, len(labels) - args.max_length)] if end else labels[args.max_length :]
                found += len(labels) >= args.max_length or set(labels) == {-100}
                cut += any(label != -100 for label in lost)
                longest = max(longest, len(labels))
    return cut, longest


def overlap(trainer):
    """Validation rows that are training rows too, token by token; rows that may have been cut are left out."""

    def hashes(data):
        for ids, starts, ends, _ in documents(data, "input_ids"):
            spans = ((a, b) for a, b in zip(starts, ends, strict=True) if b - a != trainer.args.max_length)
            yield from (hash(ids[a:b].tobytes()) for a, b in spans)

    held_out = [*hashes(trainer.eval_dataset)] if isinstance(trainer.eval_dataset, datasets.Dataset) else []
    seen = {*held_out} & {*hashes(trainer.train_dataset)} if held_out else ()
    return sum(one in seen for one in held_out)


def check_rows(trainer, rows, allow):
    found = count(trainer)
    cut, longest = cut_rows(trainer, rows, found["full"])
    kind = "packs" if trainer.padding_free or trainer.args.packing else "rows"
    lost = f"{cut:,} of {len(rows):,} rows cut by max_length within what is trained"
    masked = f"{found['masked']:,} of {found['units']:,} {kind} with nothing to train"
    shared = overlap(trainer)
    share = found["trained"] / max(1, found["tokens"])
    line = f"{found['trained']:,} of {found['tokens']:,} tokens trained ({share:.1%}), {lost}, {masked}"
    say(trainer.args, line + f", {shared:,} validation rows stand in train too" * (shared > 0))
    if cut > SHARE * len(rows) and "cut_answers" not in allow:
        raise ValueError(f"{lost}: --max_length {longest} keeps them whole, --allow cut_answers trains them cut")
    if found["masked"] > SHARE * found["units"] and "masked_packs" not in allow:
        raise ValueError(
            f"{masked}: they cost time at loss 0: leave out the rows that hold no answer or lose it to max_length; "
            "--allow masked_packs goes on with them"
        )


# -- personas: a bug that dropped every system message of SmolLM3's training changed no score -------------------------
def spoken(text):
    """Text without the switches that a template takes out of a persona and without a difference of blanks."""
    return " ".join(re.sub(r"/(?:no_think|think|system_override)\b", " ", text).split())


def lost_personas(trainer, rows):
    """[(row, persona)] of the rows with a system message, or a template argument that says who speaks, that the
    rendered text leaves out. Each is rendered with a mark behind it, as data_prep/check.py does: its text alone might
    stand in the template's own persona, or in what the user says."""
    template = Path(trainer.args.chat_template_path).read_text(encoding="utf-8")
    names = [n for n in ("messages", "prompt", "tools", "chat_template_kwargs") if n in rows.column_names]
    lost, seen = [], {}

    def render(turns, kwargs, tools):
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        given = {"chat_template": template, "tools": tools, "tokenize": False}
        return spoken(trainer.processing_class.apply_chat_template(turns, **given, **kwargs))

    def missing(turns, kwargs, tools):
        where = {n for n, turn in enumerate(turns) if turn["role"] in ("system", "developer") and turn.get("content")}
        told = {name: f"{kwargs[name]} personamark" for name in PERSONAS if kwargs.get(name)}
        marked = [t | {"content": f"{t['content']} personamark"} if n in where else t for n, t in enumerate(turns)]
        try:
            text = render(marked, kwargs | told, tools)
        except TemplateError:  # the row itself renders, or it would not be here: it is looked at as it stands
            marked, told, text = turns, {name: kwargs[name] for name in told}, render(turns, kwargs, tools)
        told = [*(marked[n]["content"] for n in where), *told.values()]
        return next((one for one in told if isinstance(one, str) and spoken(one) not in text), None)

    for number, row in enumerate(rows.select_columns(names)):
        turns, kwargs, tools = row.get("messages") or row.get("prompt"), row.get("chat_template_kwargs") or {}, None
        if not isinstance(turns, list) or not (
            {turn["role"] for turn in turns} & {"system", "developer"} or any(map(kwargs.get, PERSONAS))
        ):
            continue
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        own = [turn["content"] for turn in turns if turn["role"] in ("system", "developer")]
        key = json.dumps([own, turns[0]["role"], bool(tools), kwargs], sort_keys=True, default=str)
        if key not in seen:  # most sets have few
            seen[key] = missing(turns, kwargs, tools)
        if seen[key]:
            lost.append((number, seen[key].removesuffix(" personamark")))
    return lost


def check_personas(trainer, rows, allow):
    lost = lost_personas(trainer, rows) if "input_ids" not in rows.column_names else []
    if lost and "lost_personas" not in allow:
        number, persona = lost[0]
        raise ValueError(
            f"{len(lost):,} of {len(rows):,} rows lose their persona, the first is row {number} from 0: "
            f"{persona[:60]!r} is not in the text that the template renders: mend the rows (data_prep/check.py names "
            "them all) or pass another --chat_template_path; --allow lost_personas trains them so"
        )


# -- the hook ---------------------------------------------------------------------------------------------------------
def say(args, text):
    if args.process_index == 0:
        print(f"preflight: {text}")


def say_downloads(script, args, model):
    """One line for each hub id: what its download takes, before it starts."""
    asked = ("model", model.model_name_or_path, model.model_revision), ("dataset", script.dataset_name, None)
    for kind, name, revision in asked:
        if args.process_index or constants.HF_HUB_OFFLINE or not name or Path(name).exists():
            continue
        with suppress(Exception):  # what is wrong with a name is said where it is loaded
            info = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
            files = [file for file in info.siblings if kind == "dataset" or LOADED.fullmatch(file.rfilename)]
            cached = partial(try_to_load_from_cache, name, repo_type=kind, revision=info.sha)
            size = sum(file.size or 0 for file in files if not isinstance(cached(filename=file.rfilename), str))
            if size:
                say(args, f"{kind} {name}: {'up to ' * (kind == 'dataset')}{size / 1e9:.2f} GB to download")


@contextmanager
def together(args):
    """All ranks refuse alike, and at once: when one ends, the launcher kills the others, and rank 0 has to speak."""
    try:
        yield
    except ValueError:
        args.distributed_state.wait_for_everyone()
        raise


def prepare(script, args, model):
    RUN.update(script=script, model=model, probed=False)
    with together(args):
        if unknown := [name for name in script.allow if name not in ALLOW]:
            known = "; ".join(f"{name} ({what})" for name, what in ALLOW.items())
            raise ValueError(f"--allow {' '.join(unknown)}: no such name, there are {known}")
        check_pair(args, model, script.allow)
        say_downloads(script, args, model)
        check_class(args, model)
        check_compiled(script, args, model)
        if args.packing and args.packing_strategy == "wrapped":
            say(args, "wrapped packing: documents see those before them in their pack, as asked for")
        elif args.packing or args.padding_free:
            check_packing(args, model)


class Preflight(TrainerCallback):
    """Does nothing: all is said before the first step."""


def callback(trainer):
    script, model = RUN["script"], RUN["model"]
    with together(trainer.args):
        check_weights(trainer, model, script.allow)
        if trainer.padding_free and not RUN["probed"]:  # rows that came packed
            check_packing(trainer.args, model)
        check_personas(trainer, script.rows, script.allow)
        check_rows(trainer, script.rows, script.allow)
    return Preflight()
