"""Build the demo's starting point from its rows: a byte-level BPE tokenizer and an untrained Qwen3 model.

    python -m data_prep.demo_model --rows runs/demo/rows --out runs/demo/init

The tokenizer is trained on ROWS/pretrain.jsonl and has Qwen3's pre-tokenizer (digits stand alone), special tokens and
defaults (eos <|im_end|>, pad <|endoftext|>), but no chat template: that comes from chat_templates/. The model is a
Qwen3ForCausalLM of 0.87 million parameters with tied embeddings. Same rows and seed, same bytes.

Exit 0: done. 2: bad input, one sentence.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import make_parser, run_command
from data_prep.common.errors import UsageError
from data_prep.common.writer import staged_folder

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

# the order of Qwen3's tokenizer; True: special, left out by decode(skip_special_tokens=True)
TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|box_start|>": True,
    "<|box_end|>": True,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}
# Qwen3's own pattern: letters with one leading mark, single digits, runs of marks, line ends, spaces
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SHAPE = {  # 0.87 million parameters
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,  # about 1 / sqrt(hidden_size): from the usual 0.02 such a short run learns far less
}


def train_tokenizer(texts: list[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Return a tokenizer with vocab_size entries, the special tokens last as in Qwen3."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # control tokens are added below, not learnt as text
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in TOKENS.items()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token, special in TOKENS.items() if special][1:],
        clean_up_tokenization_spaces=False,
        model_max_length=SHAPE["max_position_embeddings"],
    )


def build_model(tokenizer: "PreTrainedTokenizerFast", seed: int) -> "Qwen3ForCausalLM":
    """Return a model in float32 with weights drawn by seed."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SHAPE,
        )
    )


def read_texts(path: Path, rows: Path) -> list[str]:
    """Return the texts to train the tokenizer on. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file: run python -m data_prep.demo_rows --out {rows} first")
    try:
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not rows of text ({error}): run python -m data_prep.demo_rows again") from None


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="folder that python -m data_prep.demo_rows wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder that does not exist yet")
    parser.add_argument("--vocab_size", type=int, default=640, help="256 bytes, 26 special tokens, the rest learnt")
    parser.add_argument("--seed", type=int, default=42)
    return run_command(parser, run)


def run(args: argparse.Namespace) -> int:
    """Return the exit code. Raises UsageError."""
    if args.vocab_size < 300:
        raise UsageError(f"--vocab_size {args.vocab_size}: bytes and special tokens alone take 282, pass 300 or more")
    with staged_folder(args.out) as folder:
        texts = read_texts(args.rows / "pretrain.jsonl", args.rows)
        if not sys.stderr.isatty():
            import transformers

            transformers.utils.logging.disable_progress_bar()
        tokenizer = train_tokenizer(texts, args.vocab_size)
        model = build_model(tokenizer, args.seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{args.out}: {len(tokenizer)} tokens, {model.num_parameters():,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
