"""Mix pools into one training set by a YAML of sources and weights, validation held out before anything is mixed.

    python -m data_prep.mix data_prep/mixes/day2_4080.yaml --pools data --out data/day2
    python -m data_prep.mix my.yaml --out data/mine --recipe recipes/qwen3_qlora.py

    strategy: interleave   # interleave, resample, subsample, concatenate
    by: rows               # what weights are shares of: rows or tokens of the final train set (tokens need --recipe)
    seed: 42
    size: 20000            # rows or tokens of the train set; left out: as many as the pools give
    validation: {share: 0.02, min: 100}    # max(min, share of all rows); 0 for none
    chat_template_kwargs: {train_turns: last}  # template arguments of every row; those that a row has win
    sources:
      - {path: cmath, weight: 0.2}         # a dataset folder, under --pools
      - {path: chats, weight: 0.8, epochs: 2, where: {tags: think, lang: zh}}
      - {path: talk, weight: 0.8, shuffle: 42, rows: 5000}     # the first 5,000 after datasets' shuffle(seed=42)

The steps: rows that are equal (same turns but for blanks, same tools and template arguments) are kept once, the first
pool wins; validation is drawn by prompt, so that a prompt stands on one side only, and the think and no_think twins of
a prompt stay together; then the train side is mixed, so that oversampling survives:
  interleave   weights are shares of the result, evenly spread; it ends where the first pool is used up (stop:
               first_exhausted) or, repeating pools, where the last is (all_exhausted); `epochs` passes over a pool are
               allowed before it counts as used up
  resample     weights are shares; rows are drawn with replacement, 0.9 of all rows where no size is given
  subsample    a weight is the share of that pool which is kept (SmolLM3's), the same prompts in every pool
  concatenate  pools one after the other, each `epochs` times; weights play no part
A negative weight counts as 0 with a warning, all of them 0 or less means equal. `shuffle: numpy` (default where the
result is not ordered by the strategy), `python` (random.Random(seed), as nanochat) or `none`. `literal: true` mixes as
the 4080 tutorial's script does: mixed first, duplicates removed after that, validation split off at the end; its
weights then change nothing where pools are used up (tests show it), hence the option.

OUT is a dataset folder with train and validation, the same as .jsonl, report.json (realised shares by source),
rejected.jsonl (duplicates, rows not drawn) and card.md. in + added = out + refused; added rows are repeats.

Exit 0: done. 1: nothing is left to train on. 2: bad input, one sentence.
"""

import hashlib
import math
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from data_prep.common.arrow_rows import SCHEMA, batch_rows, counts_of, json_array, json_lines, plain_columns, row_bodies
from data_prep.common.batches import keys
from data_prep.common.chunks import ROWS, Chunk, batches_of
from data_prep.common.command_line import add_num_proc, make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.json_text import dump_json, load_json
from data_prep.common.parallel import parallel_map
from data_prep.common.readers import arrow_chunks, is_dataset_folder, list_splits
from data_prep.common.row_keys import prompt_key, row_key
from data_prep.common.writer import ChunkResult, DatasetWriter, EncodedRows

STRATEGIES = ("interleave", "resample", "subsample", "concatenate")
MIX = {  # name: (type, default)
    "strategy": (str, "interleave"), "by": (str, "rows"), "seed": (int, 42), "size": (int, None),
    "stop": (str, "first_exhausted"), "shuffle": (str, None), "literal": (bool, False), "dedup": (bool, True),
    "validation": (dict, {"share": 0.02, "min": 100}), "chat_template_kwargs": (dict, {}), "sources": (list, None),
}  # fmt: skip
SOURCE = {"path": str, "name": str, "weight": float, "epochs": float, "rows": int, "shuffle": int, "where": dict,
          "split": str}  # fmt: skip
CHOICES = {"strategy": STRATEGIES, "by": ("rows", "tokens"), "stop": ("first_exhausted", "all_exhausted"),
           "shuffle": ("numpy", "python", "none", None)}  # fmt: skip
GATHER = 5000  # rows of an output block


# -- the YAML ---------------------------------------------------------------------------------------------------------
def read_mix(path, pools=None, seed=None):
    """The mix as a dict of MIX's names, its sources as dicts of SOURCE's. Raises UsageError."""
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror}): pass a mix like those of data_prep/mixes"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML ({' '.join(str(error).split())}): mend it") from None
    if not isinstance(given, dict) or not isinstance(given.get("sources"), list) or not given["sources"]:
        raise UsageError(f"{path}: names no sources: write `sources:` and lines of `- {{path: …, weight: …}}`")
    if unknown := [name for name in given if name not in MIX]:
        raise UsageError(f"{path}: {unknown[0]} is no name of a mix: write one of {', '.join(MIX)}")
    mix = {name: default for name, (_, default) in MIX.items()} | given
    if mix["validation"] in (0, None, False):
        mix["validation"] = {"share": 0, "min": 0}
    mix["seed"] = mix["seed"] if seed is None else seed
    for name, (kind, default) in MIX.items():
        value = mix[name]
        fits_type = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not fits_type and not (value is None and default is None):
            raise UsageError(f"{path}: {name} is {value!r}, it must be {kind.__name__}")
        if name in CHOICES and value not in CHOICES[name]:
            raise UsageError(f"{path}: {name} is {value!r}, it must be one of {', '.join(map(str, CHOICES[name]))}")
    if {*mix["validation"]} - {"share", "min"} or not all(number(v) and v >= 0 for v in mix["validation"].values()):
        raise UsageError(f"{path}: validation holds share and min, numbers of at least 0")
    mix["sources"] = [read_source(path, place, source, pools) for place, source in enumerate(mix["sources"], 1)]
    names = Counter(source["name"] for source in mix["sources"])
    if twice := [name for name, count in names.items() if count > 1]:
        raise UsageError(f"{path}: two sources are called {twice[0]}: give them a `name` each")
    if mix["strategy"] == "subsample" and any(source["weight"] > 1 for source in mix["sources"]):
        raise UsageError(f"{path}: the weights of subsample are shares of each pool, at most 1 (repeat by epochs)")
    if mix["literal"] and (mix["strategy"] not in ("interleave", "resample") or mix["by"] != "rows"):
        raise UsageError(f"{path}: literal mixes by rows with interleave or resample, as the tutorial does")
    return mix


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_source(path, place, source, pools):
    if not isinstance(source, dict) or not isinstance(source.get("path"), str):
        raise UsageError(f"{path}: source {place} has no path: write - {{path: data/pool, weight: 1}}")
    if unknown := [name for name in source if name not in SOURCE]:
        raise UsageError(f"{path}: source {place}: {unknown[0]} is unknown: write one of {', '.join(SOURCE)}")
    defaults = {"weight": 1.0, "epochs": 1, "rows": None, "shuffle": None, "where": {}, "split": "train"}
    source = {"name": source["path"], **defaults} | source
    for name, kind in SOURCE.items():
        value = source[name]
        if kind is float and not number(value) or kind in (str, dict) and not isinstance(value, kind):
            raise UsageError(f"{path}: source {place}: {name} is {value!r}, it must be {kind.__name__}")
    for name, least in (("rows", 1), ("shuffle", 0)):
        if source[name] is not None and (not isinstance(source[name], int) or source[name] < least):
            raise UsageError(f"{path}: source {place}: {name} is {source[name]!r}, it must be a number from {least} on")
    if source["epochs"] <= 0:
        raise UsageError(f"{path}: source {place}: epochs is {source['epochs']}, it must be above 0")
    if unknown := {*source["where"]} - {"source", "tags", "lang", "mode"}:
        raise UsageError(f"{path}: source {place}: where knows source, tags, lang and mode, not {min(unknown)}")
    if source["weight"] < 0:
        print(f"{path}: the weight of {source['name']} is {source['weight']}, counted as 0", file=sys.stderr)
        source["weight"] = 0.0
    folder = Path(pools or ".", source["path"])
    if not is_dataset_folder(folder):
        raise UsageError(
            f"{folder}: no dataset folder: make it (python -m data_prep.normalize), or pass its parent as --pools"
        )
    source["folder"] = folder
    return source


def shares_of(weights):
    """Weights as shares of 1; all zero means equal."""
    weights = np.maximum(np.asarray(weights, float), 0)
    return weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))


# -- what is known of each row ----------------------------------------------------------------------------------------
COLUMNS_READ = [("key", "S16"), ("prompt", "u8"), ("tokens", "i8"), ("trained", "i8"), ("turns", "i4"), ("think", "?"),
                ("kept", "?"), ("broken", "?")]  # fmt: skip


def known(block, where, recipe_flags=None, kwargs=None):
    """Result of a Block of a pool; more: (array of COLUMNS_READ, ids, languages)."""
    batch = block.data
    table = np.zeros(len(batch), COLUMNS_READ)
    plain, *columns = keys(batch)
    for name, column in zip(("key", "prompt", "turns"), columns, strict=True):
        table[name][plain] = column
    for place, row in zip(np.flatnonzero(~plain), batch_rows(batch.filter(pa.array(~plain))), strict=True):
        table[place]["key"], table[place]["prompt"] = row_key(row), prompt_key(row)
        table[place]["turns"] = sum(turn["role"] in ("user", "assistant") for turn in row["messages"])
        table[place]["think"] = any(turn.get("reasoning_content") for turn in row["messages"])
    ids, sources, tags, langs = (batch.column(name).to_pylist() for name in ("id", "source", "tags", "lang"))
    modes = ["think" if think else "no_think" for think in table["think"]]
    table["kept"] = [fits(*has, where) for has in zip(sources, langs, tags, modes, strict=True)] if where else True
    if recipe_flags:
        from data_prep.common.tokens import tokenize_rows

        against, settings = against_of(recipe_flags)
        failed = []
        rows = [row | {"chat_template_kwargs": {**(kwargs or {}), **row["chat_template_kwargs"]}}
                for row in batch_rows(batch)]  # fmt: skip
        for doc in tokenize_rows([*enumerate(rows)], against, settings, True, failed, False):
            table[doc.number]["tokens"], table[doc.number]["trained"] = len(doc.ids), doc.trained()
        for number, *_ in failed:
            table[number]["broken"], table[number]["kept"] = table[number]["kept"], False
    return ChunkResult(rows_in=len(batch), payload=(table, ids, langs))


def fits(source, lang, tags, mode, where):
    """Whether a row is what `where` asks for; a list names alternatives."""
    has = {"source": [source], "lang": [lang], "tags": tags, "mode": [mode]}
    return all({*map(str, has[name])} & {*map(str, wanted if isinstance(wanted, list) else [wanted])}
               for name, wanted in where.items())  # fmt: skip


@cache
def against_of(flags):
    from data_prep.common.recipe_settings import read_settings
    from data_prep.common.rendering import load_renderer

    recipe, *more = flags
    settings = read_settings(recipe, flags=dict(zip(("model_name_or_path", "chat_template_path"), more, strict=True)))
    settings.assistant_only_loss = True  # response tokens are told from context ones, whatever the recipe trains
    return load_renderer(settings), settings


# -- which rows, how often, in which order ----------------------------------------------------------------------------
def mixed_up(values, seed):
    """64-bit values as a hash of theirs with the seed (splitmix64): sorted by it, equal prompts stay together, and two
    pools draw the same prompts."""
    with np.errstate(over="ignore"):
        x = values.astype("u8") + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def drawn_order(rows, prompts, seed):
    """The rows (indices) in the order in which they are drawn: by prompt, at random."""
    return rows[np.argsort(mixed_up(prompts[rows], seed), kind="stable")]


def held_out(rows, owner, prompts, validation, seed):
    """Mask of the rows that go to validation: max(min, share) of all, from each pool its share, whole prompts."""
    count = max(int(validation.get("min", 0)), int(validation.get("share", 0) * len(rows)))
    mask = np.zeros(len(owner), bool)
    if not count:
        return mask
    if count >= len(rows):
        raise UsageError(f"validation: {count} of {len(rows)} rows would be held out: write a smaller min and share")
    pools = np.unique(owner[rows])
    quotas = rounded(count, np.array([(owner[rows] == pool).sum() / len(rows) for pool in pools]))
    sides = set()
    for pool, quota in zip(pools, quotas, strict=True):
        mine = drawn_order(rows[owner[rows] == pool], prompts, seed + 1)
        left = quota
        for prompt in prompts[mine]:
            if left <= 0:
                break
            sides.add(int(prompt))
            left -= 1
    mask[rows] = np.isin(prompts[rows], np.array(sorted(sides), "u8"))
    if mask.sum() >= len(rows):
        raise UsageError("validation: rows of one prompt would all be held out: write a smaller min and share")
    return mask


def rounded(total, shares):
    """Whole numbers that sum to total, by largest remainder."""
    exact = total * np.asarray(shares)
    out = np.floor(exact + 1e-9).astype(int)
    for place in np.argsort(out - exact, kind="stable")[: total - out.sum()]:
        out[place] += 1
    return out


class Pool:
    """The train rows of one source, in drawing order, as often as they may be taken."""

    def __init__(self, source, rows, sizes):
        self.name, self.weight, self.epochs, self.rows = source["name"], source["weight"], source["epochs"], rows
        self.sizes = sizes[rows]  # 1 a row, or its tokens

    def available(self):
        return self.sizes.sum() * self.epochs

    def take(self, quota):
        """(rows, passes, position of each in 0..1) until the quota of rows or tokens is met as closely as whole rows
        can; passes count from 0."""
        if quota <= 0 or not len(self.rows):
            return np.zeros(0, int), np.zeros(0, int), np.zeros(0)
        passes = int(quota // self.sizes.sum()) + 1
        sizes = np.tile(self.sizes, passes)
        ends = np.cumsum(sizes)
        count = int(np.searchsorted(ends - sizes / 2, quota, side="left"))  # a row whose middle lies within is taken
        rows, number = np.tile(self.rows, passes)[:count], np.repeat(np.arange(passes), len(self.rows))[:count]
        return rows, number, (ends[:count] - sizes[:count] / 2) / max(ends[count - 1] if count else 1, 1)


def interleave(pools, mix):
    shares = shares_of([pool.weight for pool in pools])
    used = [(pool, share) for pool, share in zip(pools, shares, strict=True) if share > 0 and len(pool.rows)]
    ends = [pool.available() / share for pool, share in used]
    total = min(ends) if mix["stop"] == "first_exhausted" else max(ends)
    wanted = mix["size"] or total
    quotas = wanted * shares
    if mix["by"] == "rows":
        quotas = rounded(int(wanted + 1e-6), shares)
    if mix["stop"] == "first_exhausted":
        quotas = [min(quota, pool.available()) for quota, pool in zip(quotas, pools, strict=True)]
    parts = [pool.take(quota) for pool, quota in zip(pools, quotas, strict=True)]
    at = np.concatenate([position for *_, position in parts])
    order = np.argsort(at, kind="stable")
    return [np.concatenate([part[n] for part in parts])[order] for n in (0, 1)]


def resample(pools, mix):
    shares, rng = shares_of([pool.weight for pool in pools]), np.random.default_rng(mix["seed"])
    shares = np.array([share if len(pool.rows) else 0 for pool, share in zip(pools, shares, strict=True)])
    shares = shares / shares.sum()
    total = mix["size"] or int(0.9 * sum(pool.sizes.sum() for pool in pools))
    quotas = rounded(total, shares) if mix["by"] == "rows" else total * shares
    rows = []
    for pool, quota in zip(pools, quotas, strict=True):
        taken, got = [], 0
        while got < quota and len(pool.rows):
            few = max(1, int((quota - got) / pool.sizes.mean()))
            places = rng.integers(len(pool.rows), size=few)
            ends = got + np.cumsum(pool.sizes[places])
            places = places[: int(np.searchsorted(ends, quota, side="left")) + 1]
            taken.append(pool.rows[places])
            got += pool.sizes[places].sum()
        rows += taken
    rows = np.concatenate(rows) if rows else np.zeros(0, int)
    return rows, occurrences(rows)


def occurrences(rows):
    """How often each entry stood before, from 0."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(rows) else np.zeros(0, int)
    counts = np.arange(len(rows)) - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
    out = np.empty(len(rows), int)
    out[order] = counts
    return out


def subsample(pools, mix):
    parts = []
    weights = [pool.weight for pool in pools]
    for pool, weight in zip(pools, weights if any(weights) else np.ones(len(pools)), strict=True):
        rows, passes, _ = pool.take(int(pool.sizes.sum() * weight + 1e-9))
        parts += [(rows, passes + number) for number in range(max(1, round(pool.epochs)))]
    return [np.concatenate([part[n] for part in parts]) for n in (0, 1)]


def concatenate(pools, mix):
    rows = []
    for pool in pools:
        rows.append(np.tile(pool.rows, math.ceil(pool.epochs))[: round(len(pool.rows) * pool.epochs)])
    rows = np.concatenate(rows)[: mix["size"]]
    return rows, occurrences(rows)


MIXERS = {"interleave": interleave, "resample": resample, "subsample": subsample, "concatenate": concatenate}


def literal(table, owner, rows, mix):
    """(train rows, validation rows) as the tutorial's build_datasets.py gets them, by datasets' own functions: mixed
    (interleave_datasets with all_exhausted, or rows drawn with replacement), equal rows removed, shuffled, split."""
    from datasets import Dataset, interleave_datasets

    shares = shares_of([source["weight"] for source in mix["sources"]])
    sets = [Dataset.from_dict({"row": rows[owner[rows] == n]}) for n in range(len(shares))]
    used = [(one, share) for one, share in zip(sets, shares, strict=True) if len(one) and share]
    seed = mix["seed"]
    if mix["strategy"] == "interleave":
        parts = [one.shuffle(seed=seed) for one, _ in used]
        chances = list(np.array([share for _, share in used]) / sum(share for _, share in used))
        mixed = interleave_datasets(parts, probabilities=chances, seed=seed, stopping_strategy="all_exhausted")["row"]
    else:
        total, rng = int(0.9 * len(rows)), np.random.default_rng(seed)
        mixed = np.concatenate([np.array(one["row"])[rng.integers(len(one), size=round(total * share))]
                                for one, share in used])  # fmt: skip
    mixed = np.array(mixed)
    _, first = np.unique(table["key"][mixed], return_index=True)
    unique = mixed[np.sort(first)]
    unique = unique[np.random.default_rng(seed).permutation(len(unique))]
    count = max(int(mix["validation"].get("min", 0)), int(len(unique) * mix["validation"].get("share", 0)))
    if count >= len(unique):
        raise UsageError(f"validation: {count} of {len(unique)} rows would be held out: write a smaller min and share")
    return unique[count:], unique[:count]


# -- rows out ---------------------------------------------------------------------------------------------------------
class Shards:
    """The Arrow batches of all pools as one list of rows, memory-mapped."""

    def __init__(self, files):
        self.batches = []
        for file in files:
            self.batches += batches_of(file)
        self.starts = np.cumsum([0, *map(len, self.batches)])

    def take(self, rows):
        """A RecordBatch of these rows, in this order."""
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(owner, kind="stable")
        parts = []
        for number in np.unique(owner):
            mine = rows[order][owner[order] == number] - self.starts[number]
            parts.append(self.batches[number].take(pa.array(mine)))
        back = np.empty(len(rows), int)
        back[order] = np.arange(len(rows))
        return pa.Table.from_batches(parts).combine_chunks().to_batches()[0].take(pa.array(back))


@cache
def shards(files):
    return Shards(files)


def gathered(block, files, kwargs=None):
    """Result of a Block whose data is (rows, passes): the rows, those of a second pass with @2 behind their ids.
    kwargs: template arguments of the mix."""
    rows, passes = block.data
    batch = shards(files).take(rows)
    if kwargs:
        told = [dump_json({**kwargs, **load_json(own.encode())}) for own in plain_columns(batch)[3]]
        batch = batch.set_column(3, SCHEMA.field(3), json_array(told))
    if passes.any():
        ids = [f"{name}@{number + 1}" if number else name
               for name, number in zip(batch.column(0).to_pylist(), passes, strict=True)]  # fmt: skip
        batch = batch.set_column(0, SCHEMA.field(0), pa.array(ids, pa.string()))
    digests, lines, counts = [], [], Counter()
    for start in range(0, len(batch), ROWS):
        part = batch.slice(start, ROWS)
        told = row_bodies(part)
        digests += [hashlib.sha256(b"{" + body).digest() for body in told]
        lines.append(json_lines(part, told))
        counts += counts_of(part)
    made = EncodedRows(batch, batch.column(0).to_pylist(), b"".join(digests), counts, Counter())
    return ChunkResult({block.split: made}, rows_in=len(rows), payload=(block.split, b"".join(lines)))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("mix", metavar="MIX.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument("--pools", help="folder that the paths of the mix are under")
    parser.add_argument("--recipe", help="counts tokens as this recipe trains them")
    parser.add_argument("--model_name_or_path", help="tokenizer, instead of the recipe's")
    parser.add_argument("--chat_template_path", help="template, instead of the recipe's")
    parser.add_argument("--seed", type=int, help="instead of the mix's")
    add_num_proc(parser)
    return run_command(parser, run)


def run(args):
    """The exit code; raises UsageError."""
    if args.out.suffix == ".jsonl":
        raise UsageError(f"{args.out}: a mix has splits: pass a folder as --out")
    mix = read_mix(args.mix, args.pools, args.seed)
    flags = args.recipe, args.model_name_or_path, args.chat_template_path
    flags = flags if any(flags) else None
    if mix["by"] == "tokens" and not flags:
        raise UsageError(f"{args.mix}: weights by tokens: pass --recipe, whose tokenizer and template count them")
    if flags:
        against_of(flags)  # a fault in it is told before the pools are read
    with DatasetWriter(args.out, "mix.py", mix["seed"]) as writer:
        return build(mix, args, flags, writer)


def build(mix, args, flags, writer):
    files, tables, ids, langs = [], [], [], []
    for source in mix["sources"]:
        found = list_splits(source["folder"])
        if source["split"] not in found:
            has = f"no split {source['split']}, only {', '.join(found)}"
            raise UsageError(f"{source['folder']}: {has}: name one as `split`")
        files += map(str, found[source["split"]])
        digest, count = hashlib.sha256(), len(ids)
        work = partial(known, where=source["where"], recipe_flags=flags, kwargs=mix["chat_template_kwargs"])
        blocks = pool_blocks(source, found[source["split"]], digest)
        for result in parallel_map(work, blocks, args.num_proc, source["name"]):
            table, names, languages = result.payload
            tables.append(table)
            ids += names
            langs += languages
        source["count"] = len(ids) - count
        writer.input_hashes[source["name"]] = digest.hexdigest()
    table = np.concatenate(tables) if tables else np.zeros(0, COLUMNS_READ)
    owner = np.repeat(np.arange(len(mix["sources"])), [source["count"] for source in mix["sources"]])
    reasons = np.full(len(table), "", object)
    rows = chosen_rows(mix, table, owner, reasons)
    if not len(rows):
        print(f"{args.mix}: no rows are left to mix", file=sys.stderr)
        return 1
    train, passes, validation = mixed(mix, table, owner, rows)
    if not len(train):
        print(f"{args.mix}: no rows are left to train on", file=sys.stderr)
        return 1
    taken = np.zeros(len(table), bool)
    taken[train] = taken[validation] = True
    reasons[~taken & (reasons == "")] = "not drawn"

    writer.rows_in, writer.rows_added = len(table), len(train) + len(validation) - int(taken.sum())
    texts = {"train": open(writer.staging / "train.jsonl", "wb")}  # noqa: SIM115 (closed below, removed by the writer)
    if len(validation):
        texts["validation"] = open(writer.staging / "validation.jsonl", "wb")  # noqa: SIM115
    parts = (("train", train, passes), ("validation", validation, np.zeros(len(validation), int)))
    blocks = (Chunk(split, split, start + 1, (some[start : start + GATHER], number[start : start + GATHER]))
              for split, some, number in parts for start in range(0, len(some), GATHER))  # fmt: skip
    job = partial(gathered, files=tuple(files), kwargs=mix["chat_template_kwargs"])
    for result in parallel_map(job, blocks, args.num_proc, "write"):
        split, lines = result.payload
        result.rows_in = 0  # counted above
        writer.add(result)
        texts[split].write(lines)
    [file.close() for file in texts.values()]
    starts = np.cumsum([0, *[source["count"] for source in mix["sources"]]])
    for row in np.flatnonzero(~taken):
        place = {"file": mix["sources"][owner[row]]["name"], "line": int(row - starts[owner[row]]) + 1}
        writer.reject(place | {"id": ids[row], "reason": reasons[row]})

    told = realised(mix, table, owner, train, validation, reasons)
    writer.close({"strategy": mix["strategy"], "by": mix["by"], "literal": mix["literal"], "sources": told},
                 {"card.md": card(args.out.name, mix, table, owner, train, langs, told, flags)})  # fmt: skip
    print(f"{args.out}: {len(train):,} rows to train, {len(validation):,} to validate, of {len(table):,}")
    width = max(len(one["name"]) for one in told)
    print(f"  {'source':{width}}  {'rows':>9}  {'train':>9}  {'repeats':>8}  {'share':>7}  {'wanted':>7}")
    for one in told:
        wanted = "" if one["wanted"] is None else f"{one['wanted']:7.2%}"
        counts = f"{one['in']:>9,}  {one['train']:>9,}  {one['repeats']:>8,}  {one['share']:7.2%}  {wanted:>7}"
        print(f"  {one['name']:{width}}  {counts}  {one['note']}".rstrip())
    return 0


def pool_blocks(source, files, digest):
    """Blocks of one split of a pool; digest gets its files. Raises UsageError."""
    for block in arrow_chunks(files, source["name"], source["split"], digest):
        if not block.own():
            raise UsageError(
                f"{block.place[0]}: not a pool of this room: python -m data_prep.normalize messages makes one"
            )
        yield block


def chosen_rows(mix, table, owner, reasons):
    """The rows that may be mixed: what `where`, `rows` and duplicates leave; the others get their reason."""
    reasons[~table["kept"]] = "not asked for"
    reasons[table["broken"]] = "template refuses the row"
    parts = []
    for number, source in enumerate(mix["sources"]):
        rows = np.flatnonzero(owner == number)
        if source["shuffle"] is not None:
            rows = rows[np.random.default_rng(source["shuffle"]).permutation(len(rows))]
        rows = rows[table["kept"][rows]]
        reasons[rows[source["rows"] :] if source["rows"] else rows[:0]] = "not asked for"
        parts.append(rows[: source["rows"]])
    rows = np.concatenate(parts)
    if not mix["dedup"] or mix["literal"]:
        return rows
    _, first, back = np.unique(table["key"][rows], return_index=True, return_inverse=True)
    same = rows[first[back]]  # the first row that each equals
    again = rows != same
    inside = owner[rows] == owner[same]
    reasons[rows[again & inside]] = "duplicate in its pool"
    reasons[rows[again & ~inside]] = "duplicate of another pool"
    return rows[~again]


def mixed(mix, table, owner, rows):
    """(train rows, passes, validation rows)"""
    seed, prompts = mix["seed"], table["prompt"]
    if mix["literal"]:
        train, validation = literal(table, owner, rows, mix)
        return train, np.zeros(len(train), int), validation
    held = held_out(rows, owner, prompts, mix["validation"], seed)
    validation, rows = rows[held[rows]], rows[~held[rows]]
    sizes = table["tokens"] if mix["by"] == "tokens" else np.ones(len(table), int)
    mine = [rows[owner[rows] == number] for number in range(len(mix["sources"]))]
    if mix["strategy"] != "concatenate":
        mine = [drawn_order(some, prompts, seed) for some in mine]
    pools = [Pool(source, some, sizes) for source, some in zip(mix["sources"], mine, strict=True)]
    if not any(len(pool.rows) for pool in pools):
        return np.zeros(0, int), np.zeros(0, int), validation
    train, passes = MIXERS[mix["strategy"]](pools, mix)
    how = mix["shuffle"] or ("numpy" if mix["strategy"] in ("resample", "subsample") else "none")
    if how == "numpy":
        order = np.random.default_rng(seed).permutation(len(train))
    elif how == "python":
        import random

        order = [*range(len(train))]
        random.Random(seed).shuffle(order)
    else:
        order = np.arange(len(train))
    return train[order], passes[order], validation


def realised(mix, table, owner, train, validation, reasons):
    """A dict a source: rows in, train, validation, repeats, realised share and the wanted one, and a note where it is
    more than 1% off, which names what ran out."""
    by_tokens = mix["by"] == "tokens"
    sizes = table["tokens"] if by_tokens else np.ones(len(table), int)
    weighted = mix["strategy"] in ("interleave", "resample")
    wanted = shares_of([source["weight"] for source in mix["sources"]]) if weighted else None
    total, out = max(1, sizes[train].sum()), []
    for number, source in enumerate(mix["sources"]):
        mine = train[owner[train] == number]
        one = {"name": source["name"], "weight": source["weight"], "in": source["count"], "train": len(mine)}
        one |= {"validation": int((owner[validation] == number).sum()), "repeats": len(mine) - len(np.unique(mine))}
        one |= {"share": round(float(sizes[mine].sum() / total), 6)}
        one |= {"wanted": round(float(wanted[number]), 6) if weighted else None, "note": ""}
        if table["tokens"].any():
            one["tokens"] = int(table["tokens"][mine].sum())
        out.append(one)
    if weighted:
        off = [one for one in out if abs(one["share"] - one["wanted"]) > 0.01]
        for one in off:
            short = one["share"] < one["wanted"]
            one["note"] = "used up: raise epochs, or stop: all_exhausted" if short else "more, as others are used up"
            if mix["literal"]:
                one["note"] = "literal: duplicates are removed after mixing, which undoes weights"
    return out


def card(name, mix, table, owner, train, langs, told, flags):
    """Markdown: the train split by source and mode (SmolLM3's table), by language and by turns."""
    counted = bool(table["tokens"].any())
    lines = [f"# {name}", "", f"{mix['strategy']} by {mix['by']}, seed {mix['seed']}"
             + (", literal" if mix["literal"] else "") + ". The train split:", ""]  # fmt: skip
    heads = ["source", "mode", "rows", "% rows"]
    heads += ["tokens", "% tokens", "tokens/row", "in context", "in response"] * counted
    lines += ["| " + " | ".join([*heads, "turns"]) + " |", "|---" * (len(heads) + 1) + "|"]
    tokens, rows = max(1, table["tokens"][train].sum()), []
    for number, source in enumerate(mix["sources"]):
        for think in (False, True):
            mine = train[(owner[train] == number) & (table["think"][train] == think)]
            if len(mine):
                rows.append((source["name"], "think" if think else "no_think", mine))
    for title, mode, mine in [*rows, ("all", "", train)]:
        cells = [title, mode, f"{len(mine):,}", f"{len(mine) / len(train):.1%}"]
        if counted:
            total, trained = table["tokens"][mine].sum(), table["trained"][mine].sum()
            cells += [f"{total:,}", f"{total / tokens:.1%}", f"{total / len(mine):,.1f}"]
            cells += [f"{(total - trained) / len(mine):,.1f}", f"{trained / len(mine):,.1f}"]
        lines.append("| " + " | ".join([*cells, f"{table['turns'][mine].mean():.1f}"]) + " |")
    lines.append("")
    if counted:
        means = [np.mean([table[column][mine].mean() for *_, mine in rows]) for column in ("tokens", "trained")]
        lines += ["Tokens are those of the rendered row, response those that are trained, context the others; turns "
                  "are messages of user and assistant. The last line holds means over rows; the mean of the lines "
                  f"above it, as the SmolLM3 playbook prints it, is {means[0]:,.1f} tokens a row, "
                  f"{means[0] - means[1]:,.1f} in context, {means[1]:,.1f} in response.", ""]  # fmt: skip
    else:
        lines += ["Tokens are not counted: `--recipe` counts them.", ""]
    lines += ["| language | rows | % rows |", "|---|---|---|"]
    for lang, count in sorted(Counter(langs[row] for row in train).items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"| {lang} | {count:,} | {count / len(train):.1%} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
