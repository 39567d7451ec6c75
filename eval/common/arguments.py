"""Arguments that several commands have. Nothing here imports torch, so that a command can show its help without."""

import argparse

TIMEOUT = 600  # seconds that the answers of one batch may take, unless --timeout says otherwise


def positive(text: str) -> int:
    """Return a whole number above 0, as the type of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name where it has none, without the full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(". ")


def add_dtype_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of how a model is loaded."""
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 on CUDA")
    parser.add_argument("--load_in_4bit", action="store_true", help="nf4 with double quantisation, as in QLoRA")


def add_model_arguments(
    parser: argparse.ArgumentParser, max_new_tokens: int | None = 256, batched: bool = True, timeout: bool = True
) -> None:
    """Add the flags that every command has which runs a model.

    max_new_tokens: the default of that flag. batched: it runs many sequences at a time. timeout: its answers have a
    limit.
    """
    add_dtype_arguments(parser)
    if batched:
        parser.add_argument("--batch_size", type=positive, default=16, help="sequences at a time")
    parser.add_argument("--max_new_tokens", type=positive, default=max_new_tokens, help="budget of each answer")
    if batched and timeout:
        parser.add_argument(
            "--timeout",
            type=positive,
            default=TIMEOUT,
            help=f"seconds for the answers of a batch (default: {TIMEOUT}); more for answers of many thousand tokens",
        )
