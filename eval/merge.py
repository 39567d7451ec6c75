"""Merge a LoRA adapter into its base, and prove that the merged and the served model answer as the adapter does.

    python -m eval.merge runs/qwen3_qlora --out models/mine
    python -m eval.merge runs/qwen3_qlora --out models/mine --into dequantized --data data/chats --split validation

Merges W + scaling B A in float32 and casts once, to the type that the base's file has. W is the base's own weight
(--into original) or, for an adapter trained on a 4-bit base, what 4 bits left of it (--into dequantized): the weights
that the adapter was trained beside, rounded only by the cast. Follows PEFT: rank and alpha patterns, rsLoRA, DoRA of
linear layers, embeddings, fan_in_fan_out, modules_to_save; tied embeddings that the adapter sets apart are untied.
What it does not follow is refused by name (experts in 3-D parameters, trained tokens, biases, PiSSA and its like).

Memory: a shard is copied as a file and its changed weights are overwritten in place, one at a time, so that merging
takes the interpreter and about six times the largest changed weight in float32, whatever the size of the model or of
its shards (tested to stay within two shards). The proof loads the models whole, one after the other.

The proof asks --prompts questions (the prompts of --data's last answers, else neutral ones), greedily, of
    adapter   on its base as it was trained: in 4 bits where the run's config.yaml or --load_in_4bit says so
    merged    loaded anew from the folder
    served    the folder behind the chat endpoint of --engine
and compares
    logits         merged - adapter, at the position of every token of the adapter's own answers, its stop included:
                   largest and mean absolute difference over the vocabulary
    top-1          positions where both have the same most likely token
    same stop      the adapter's answers that end by themselves, where merged would end with the same token there
    same text      answers that merged generates as the adapter does, token by token
    served         prompts of the same length in tokens, the same text, and an end for the same reason, against merged;
                   where the texts are the same and the server tells them (vLLM, llama.cpp), the largest difference of
                   the log-probabilities of their tokens
It fails beyond --max_logit_diff or below --min_top1 (top-1, same stop, all of served). Defaults: adapters beside 4-bit
weights differ from what --into original makes of them, hence wider bounds; round_trip.py has them.

Writes config, weights, generation_config (ends on the template's stop token and on what the base ends on, pads with
another), tokenizer with the serving template, and merge_report.json to --out, which must not exist: all in a hidden
folder beside it, renamed at the end. Exit 0 proven, 1 beyond a bound (the folder is there, the report says what), 2 bad
input. --prompts 0 proves nothing, --no_serve serves nothing; the report says so.
"""

import json
import math
import re
import shutil
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from data_prep.common.errors import UsageError
from eval.common.models import (
    adapter_base,
    add_adapter,
    check_vocabulary,
    first_line,
    load_model,
    load_tokenizer,
    positive,
    render,
)
from eval.common.round_trip import BOUNDS, ask_adapter, ask_merged, ask_served, findings, questions
from eval.common.scores import command, parser_of
from eval.endpoint import ENGINES, check_engine

FOLLOWED = {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
            "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
            "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
            "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"}  # fmt: skip
PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}  # the base untouched
KEYS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B",
        "lora_magnitude_vector": "size", "lora_magnitude_vector.weight": "size", "weight": "whole",
        "base_layer.weight": "whole"}  # fmt: skip

KINDS = (torch.nn.Linear, Conv1D, torch.nn.Embedding)


# -- what is merged --------------------------------------------------------------------------------------------------


def read_adapter(folder):
    """(config, {module: {part: (file, key)}}) of a LoRA adapter that this script can follow. Raises UsageError."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{folder} is a {config.get('peft_type')} adapter: only LoRA can be merged here")
    for name, value in config.items():
        if name not in FOLLOWED and value not in PLAIN.get(name, ()) and value:
            raise UsageError(f"{folder} was trained with {name}={value!r}, which cannot be merged here: use PEFT's "
                           "merge_and_unload")  # fmt: skip
    path, parts = folder / "adapter_model.safetensors", {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = key.removeprefix("base_model.model.")
                end = next((end for end in sorted(KEYS, key=len, reverse=True) if name.endswith("." + end)), None)
                if end is None:
                    raise UsageError(f"{path} holds {key}, which cannot be merged here: use PEFT's merge_and_unload")
                parts.setdefault(name.removesuffix("." + end), {})[KEYS[end]] = (path, key)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is not readable ({first_line(error)}): save the adapter again") from None
    if half := [name for name, part in parts.items() if ("A" in part) != ("B" in part)]:
        raise UsageError(f"{path} lacks half of {half[0]}: save the adapter whole")
    return config, parts


def read_base(name):
    """(folder, {weight: its file}) of a base's safetensors, a folder or hub id. Raises UsageError."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:  # a name that is none, no hub, no such model: one type each
            raise UsageError(f"the base {name} is neither a folder here nor a model that the hub gives now "
                           f"({first_line(error)}): pass --base with a local folder") from None  # fmt: skip
    index, files = folder / "model.safetensors.index.json", {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        for path in sorted({folder / name for name in named.values()} or {folder / "model.safetensors"}):
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"the base {name} has no whole set of safetensors ({first_line(error)}): pass --base with "
                       "another folder, or save it again") from None  # fmt: skip
    if config.get("quantization_config"):
        raise UsageError(f"the base {name} is stored quantised: pass --base with the model it was made from")
    if missing := sorted(set(named) - set(files)):
        raise UsageError(f"{name} lacks {len(missing)} weights, the first is {missing[0]}: save the model whole")
    return folder, files


def skeleton(base, four_bit):
    """The base without weights, its modules' types, and the names of those that loading in 4 bits quantises."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{base} is no causal language model of transformers ({first_line(error)}): pass --base"
        ) from None
    kinds = {name: type(module) for name, module in model.named_modules()}
    if not four_bit:
        return model, kinds, set()
    from bitsandbytes.nn import Linear4bit

    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    return model, kinds, {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def tensor(file, name):
    with safe_open(file, "pt") as opened:  # opened for each, or all pages read so far would stay in memory
        return opened.get_tensor(name)


def scaling_of(config, module, rank):
    """alpha / r, or alpha / sqrt(r) of rsLoRA (Kalajdzievski 2023), with PEFT's patterns."""
    from peft.utils.other import get_pattern_key

    alpha = config.get("alpha_pattern") or {}
    alpha = alpha.get(get_pattern_key(alpha, module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def through_4bit(weight, dtype, device):
    """What loading in 4 bits, as models.load_model does it, leaves of a weight."""
    import bitsandbytes as bnb

    packed = bnb.nn.Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True)
    packed = packed.to(device)
    return bnb.functional.dequantize_4bit(packed.data, packed.quant_state)


@torch.inference_mode()
def new_weight(module, weight, parts, config, kind, quantize, device):
    """The merged weight of a module, in the type and on the device of its old one; quantize: through 4 bits first."""
    old, read = weight, {part: tensor(*place).to(device).float() for part, place in parts.items()}
    weight = read.get("whole", weight).to(device)
    if weight.shape != old.shape:
        raise UsageError(
            f"the adapter's {module} is {tuple(weight.shape)}, the base's {tuple(old.shape)}: pass its base"
        )
    turned = issubclass(kind, (Conv1D, torch.nn.Embedding))  # stored as (in, out)
    weight = weight.T if turned else weight
    weight = (quantize(weight) if quantize and "whole" not in read else weight).float()
    if "A" in read:
        if (read["B"].shape[0], read["A"].shape[1]) != weight.shape or read["A"].shape[0] != read["B"].shape[1]:
            shapes = [tuple(read[part].shape) for part in "BA"]
            raise UsageError(f"the adapter's {module} is {shapes[0]} x {shapes[1]}, the base's weight "
                           f"{tuple(weight.shape)}: pass the base that it was trained on")  # fmt: skip
        weight = weight + scaling_of(config, module, read["A"].shape[0]) * (read["B"] @ read["A"])
        if "size" in read:  # DoRA (Liu et al. 2024), equation 5: a length for each output
            weight *= (read["size"].reshape(-1) / torch.linalg.vector_norm(weight, dim=1))[:, None]
    weight = (weight.T if turned else weight).to(old.dtype).contiguous().to(old.device)
    if not torch.isfinite(weight).all():
        raise UsageError(f"the merged {module} is not finite in {old.dtype}: the adapter or its base is damaged")
    return weight


def overwrite(path, name, weight):
    """Put a weight over the one of that name, type and shape in a safetensors file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")  # the format: 8 bytes of length, a JSON header, the data
        start, end = json.loads(file.read(size))[name]["data_offsets"]
        data = weight.reshape(-1).view(torch.uint8).numpy()
        assert len(data) == end - start, name
        file.seek(8 + size + start)
        file.write(data)


def check_modules(args, config, parts, model, kinds, files):
    """Refuse an adapter of another base, and a base with missing weights."""
    for module, part in parts.items():
        plain = set(part) == {"whole"}
        if module not in kinds or not (plain or issubclass(kinds[module], KINDS)):
            raise UsageError(f"the adapter changes {module}, which {args.base} has not: pass the base of its training")
        if "size" in part and not issubclass(kinds[module], torch.nn.Linear):
            raise UsageError(
                f"DoRA on {module}, which is not linear, cannot be merged here: use PEFT's merge_and_unload"
            )
    tied = model.all_tied_weights_keys
    missing = sorted({name for name, _ in model.named_parameters()} - set(tied) - set(files))
    if missing and not get_model_conversion_mapping(model, add_legacy=False):
        raise UsageError(f"{args.base} lacks {len(missing)} weights, the first is {missing[0]}: pass a whole model")
    if lost := sorted({f"{module}.weight" for module in parts} - set(tied) - set(files)):
        raise UsageError(f"{args.base} stores {lost[0]} under another name, which cannot be merged here: use PEFT's "
                       "merge_and_unload")  # fmt: skip


def write_weights(args, config, parts, model, kinds, small, files, out, dtype):
    """Write the base's shards with the merged weights; {merged, replaced, quantized: counts; untied: names}."""
    tied = dict(model.all_tied_weights_keys)  # {a weight: the one it is}
    if config.get("ensure_weight_tying"):
        parts = {tied.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight"): parts[name] for name in parts}
    touched = {f"{module}.weight" for module in parts}
    untied = [] if config.get("ensure_weight_tying") else [name for name in tied if {name, tied[name]} & touched]
    extra = [name for name in untied if name not in files]
    if args.into == "dequantized":
        touched |= {f"{module}.weight" for module in small}

    def merged(name, source):
        module = name.removesuffix(".weight")
        rounded = args.into == "dequantized" and module in small
        quantize = partial(through_4bit, dtype=dtype, device=args.device) if rounded else None
        return new_weight(module, tensor(files[source], source), parts.get(module, {}), config, kinds[module], quantize,
                          args.device)  # fmt: skip

    shards = sorted(set(files.values()))
    total, placed = len(shards) + bool(extra), {}
    names = [f"model-{i + 1:05}-of-{total:05}.safetensors" if total > 1 else "model.safetensors" for i in range(total)]
    for shard, name in zip(shards, names, strict=False):
        shutil.copyfile(shard, out / name)
        for weight in [weight for weight, file in files.items() if file == shard]:
            placed[weight] = name
            if weight in touched:
                overwrite(out / name, weight, merged(weight, weight))
    if extra:
        save_file({name: merged(name, tied[name]) for name in extra}, out / names[-1], metadata={"format": "pt"})
        placed |= dict.fromkeys(extra, names[-1])
    if total > 1:
        size = sum((out / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return {
        "merged": sum("A" in part for part in parts.values()),
        "replaced": sum("A" not in part for part in parts.values()),
        "dequantized": len(small) if args.into == "dequantized" else 0,
        "untied": untied,
    }


# -- what is written beside it ---------------------------------------------------------------------------------------


def stop_of(tokenizer):
    """The token that the template ends an answer with: the first of the added ones after it."""
    messages = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": "unlikely words"}]
    text, _ = render(tokenizer, messages, generation_prompt=False)
    added = set(tokenizer.get_added_vocab().values())
    tail = tokenizer(text.rpartition("unlikely words")[2], add_special_tokens=False)["input_ids"]
    stop = next((token for token in tail if token in added), None)
    if stop is None:
        raise UsageError("the adapter's chat template ends an answer with no special token: train with one that does")
    return stop


def write_rest(base, tokenizer, out, untied):
    """Write config, generation config and tokenizer; (ids of the stop tokens, of the padding)."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    if untied:
        for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = base / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    eos = generation.get("eos_token_id")
    own = {stop_of(tokenizer), tokenizer.eos_token_id} - {None}
    if tokenizer.pad_token_id in own | {None}:  # the recipes' own choice: padding that means stop gives empty answers
        stops = set(tokenizer.convert_ids_to_tokens(sorted(own)))
        tokenizer.pad_token = min(tokenizer.get_added_vocab(), key=lambda token: (token in stops, "pad" not in token))
    pad = tokenizer.pad_token_id
    stops = (own | set(eos if isinstance(eos, list) else [eos])) - {None, pad}
    eos = sorted(stops) if len(stops) > 1 else min(stops)
    generation = generation | {"eos_token_id": eos, "pad_token_id": pad}
    generation.pop("_from_model_config", None)
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    # the serving form: markers become empty comments, which render nothing
    template = re.sub(r"{%(\W?)\s*(?:end)?generation\s*(\W?)%}", r"{#\1 \2#}", tokenizer.chat_template)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(out)
    return sorted(stops), pad


# -- the command -----------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = parser_of(__doc__)
    parser.add_argument("adapter", type=Path, help="run folder of a LoRA adapter, with its tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the merged model; must not exist")
    parser.add_argument("--base", help="folder or hub id of the base (default: the one that the adapter names)")
    parser.add_argument("--into", choices=["original", "dequantized"], default="original", help="which base weights")
    parser.add_argument("--load_in_4bit", action="store_true", help="trained on nf4 (default: what config.yaml says)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="of the proof; auto: as trained (config.yaml), else the base's")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=50, help="how many to ask; 0: merge without proof")
    parser.add_argument("--data", type=Path, help="rows whose prompts are asked (default: neutral prompts)")
    parser.add_argument("--split", default="test", help="split of a dataset folder that has several")
    parser.add_argument("--max_new_tokens", type=positive, default=32, help="budget of each answer")
    parser.add_argument("--max_logit_diff", type=float, help="bound (default by dtype, 4 bits and --into)")
    parser.add_argument("--min_top1", type=float, help="bound (default by dtype, 4 bits and --into)")
    parser.add_argument("--no_serve", action="store_true", help="leave out the server")
    parser.add_argument("--engine", choices=ENGINES, default="transformers", help="what serves")
    parser.add_argument("--engine_python", default=sys.executable, help="the Python that has the engine (converter)")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py, for llamacpp")
    parser.add_argument("--llama_server", default="llama-server", help="llama.cpp's program, for llamacpp")
    return parser.parse_args(argv)


def settle(args):
    """Fill in what depends on the run: base, device, dtype, 4 bits, bounds. Raises UsageError."""
    if not (args.adapter / "adapter_config.json").is_file():
        raise UsageError(f"{args.adapter} is no adapter: pass a run folder with adapter_config.json")
    if args.out.exists():
        raise UsageError(f"{args.out} exists: pass another --out, or remove it")
    if args.engine == "llamacpp" and not args.no_serve and not (args.converter and args.converter.is_file()):
        raise UsageError("llamacpp serves GGUF files: pass --converter with llama.cpp's convert_hf_to_gguf.py")
    if args.prompts and not args.no_serve:
        # before minutes of merging
        check_engine(args.engine, args.llama_server if args.engine == "llamacpp" else args.engine_python)
    args.base = args.base or adapter_base(args.adapter)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    path = args.adapter / "config.yaml"
    trained = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    args.load_in_4bit |= bool(trained.get("load_in_4bit"))
    kind = trained.get("bnb_4bit_quant_type", "nf4"), trained.get("use_bnb_nested_quant", True)
    if args.load_in_4bit and kind != ("nf4", True):
        raise UsageError(f"{path} says {kind[0]}, nested {kind[1]}: only nf4 with nested quantisation is known here")
    if args.into == "dequantized" and not args.load_in_4bit:
        raise UsageError(f"{args.adapter} was not trained in 4 bits, by its config.yaml: pass --load_in_4bit if it was")
    return trained


def merge(args):
    trained = settle(args)
    config, parts = read_adapter(args.adapter)
    base, files = read_base(args.base)
    tokenizer, stops = load_tokenizer(args.adapter)
    check_vocabulary(str(base), tokenizer)
    model, kinds, small = skeleton(base, args.load_in_4bit)
    check_modules(args, config, parts, model, kinds, files)
    if args.dtype == "auto":
        args.dtype = trained.get("dtype") or str(model.config.dtype or torch.float32).removeprefix("torch.")
    dtype = getattr(torch, args.dtype)
    bounds = BOUNDS[args.dtype == "float32", args.load_in_4bit, args.into]
    args.max_logit_diff = bounds[0] if args.max_logit_diff is None else args.max_logit_diff
    args.min_top1 = bounds[1] if args.min_top1 is None else args.min_top1
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    asked, refused = questions(args.data, args.split, args.prompts, tokenizer, room - args.max_new_tokens)

    part = args.out.with_name(f".{args.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        part.mkdir(parents=True)
        with tempfile.TemporaryDirectory(dir=part) as folder:
            if asked:
                adapter = load_model(str(base), tokenizer, dtype, args.device, args.load_in_4bit)
                adapter = add_adapter(adapter, args.adapter)
                outputs = ask_adapter(adapter, tokenizer, stops, asked, args.max_new_tokens, Path(folder))
                del adapter
            written = write_weights(args, config, parts, model, kinds, small, files, part, dtype)
            eos, pad = write_rest(base, tokenizer, part, written["untied"])
            merged = served = None
            if asked:
                merged, again, chosen = ask_merged(part, asked, outputs, stops, Path(folder), args)
                served = None if args.no_serve else ask_served(part, asked, again, chosen, tokenizer, args)
        found = findings(merged, served, args.max_logit_diff, args.min_top1)
        keys = ("into", "load_in_4bit", "dtype", "device", "max_new_tokens", "max_logit_diff", "min_top1")
        report = {
            "settings": {  # names, not paths: the report is the same wherever the folders lie
                "adapter": args.adapter.resolve().name,
                "base": base.resolve().name if Path(args.base).is_dir() else args.base,
                "data": args.data.resolve().name if args.data else "neutral prompts",
                **{key: getattr(args, key) for key in keys},
            },
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
            "weights": written,
            "eos": tokenizer.convert_ids_to_tokens(eos),
            "pad": tokenizer.convert_ids_to_tokens(pad),
            "prompts": {"asked": len(asked), "refused": refused},
            "merged_against_adapter": merged or "not run: --prompts 0",
            "served_against_merged": served or f"not run: {'--no_serve' if asked else '--prompts 0'}",
            "findings": found,
        }
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (part / "merge_report.json").write_text(text, encoding="utf-8")
        part.rename(args.out)
    except OSError as error:
        raise UsageError(f"cannot write to {args.out} ({first_line(error)}): make room or pass another --out") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    show(report)
    for sentence in found:
        print(f"FAILED {sentence}")
    print(f"wrote {args.out}")
    return bool(found)


def show(report):
    """Print the table of a report."""
    settings = report["settings"]
    table = Table("comparison", "figure", "value (95%)", "n", title=f"{settings['adapter']} into {settings['base']}")
    for key in ("merged_against_adapter", "served_against_merged"):
        figures, name = report[key], key.replace("_", " ")
        if isinstance(figures, str):
            table.add_row(name, figures, "", "", end_section=True)
            continue
        for label, value in figures.items():
            if isinstance(value, dict):
                cells = f"{value['value']:.3f} ({value['low']:.3f}–{value['high']:.3f})", f"{value['total']:,}"
            else:
                cells = f"{value:.3g}" if isinstance(value, float) else str(value or 0), ""
            table.add_row(name, label.replace("_", " "), *cells)
            name = ""
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 130, markup=False, emoji=False, highlight=False).print(table)


def main(argv=None):
    return command("merge.py", merge, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
