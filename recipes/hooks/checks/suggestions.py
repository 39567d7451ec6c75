"""The nearest existing name to one that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest_name(name: str, known_names: Iterable[str]) -> str:
    """Return ", the nearest is X", or "" where no known name is near."""
    matches = get_close_matches(name, list(known_names), n=1)
    if not matches:
        return ""
    return f", the nearest is {matches[0]}"
