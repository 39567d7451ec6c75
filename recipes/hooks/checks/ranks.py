"""All ranks refuse alike."""

from collections.abc import Iterator
from contextlib import contextmanager

from trl import SFTConfig


@contextmanager
def refuse_on_all_ranks(training_args: SFTConfig) -> Iterator[None]:
    """Let all ranks arrive at a refusal (UsageError, or a ValueError of a library) before any of them ends.

    When one rank ends, the launcher kills the rest, and rank 0 has to print the sentence first.
    """
    try:
        yield
    except ValueError:
        training_args.distributed_state.wait_for_everyone()
        raise
