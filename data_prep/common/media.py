"""Tell rows with pictures, sound or film, which no template here has a place for, from rows of text."""

import re
from collections.abc import Iterable

from .errors import InvalidRow

MEDIA = ("images", "videos", "audios", "image", "video", "audio")  # columns, and keys of messages
PART_MEDIA = (*MEDIA, "image_url", "video_url", "audio_url", "input_audio", "file")  # keys of content parts
TOKENS = re.compile(r"(?:<(image|video|audio)(?:_placeholder|[ _-]?\d{1,3})?>[ \t]*)+")  # that stand for media in text
CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`", re.DOTALL)


def refuse_media(row: dict, where: str, keys: Iterable[str] = MEDIA) -> None:
    """Raise InvalidRow for pictures, sound or film beside the text."""
    for key in keys:
        if row.get(key):
            raise InvalidRow(f"row with {key}", f"{where}: {str(row[key])[:80]}: text alone is trained here")


def find_media_token(text: str, columns: Iterable[str] = ()) -> str | None:
    """Return the first token in a text that stands for media, as in LLaMA-Factory, LLaVA and ms-swift; None without.

    Their rows keep it where the column of the media is gone. Code, HTML and talk of tags are none: a token counts
    outside of code, without a closing tag in the text, where it stands alone. Where a column of such media is there,
    though it is empty, it counts anywhere.
    """
    if "<" not in text or TOKENS.search(text) is None:
        return None
    prose = CODE.sub("code", text)
    for match in TOKENS.finditer(prose):
        kind = match[1]
        if f"</{kind}" in text:
            continue
        if kind in columns or f"{kind}s" in columns or stands_alone(prose, match):
            return match[0].strip()
    return None


def stands_alone(prose: str, match: re.Match) -> bool:
    """Return whether tokens are no words of a sentence: they fill lines, begin a text, or end it behind a sentence.

    "<video>Why?" and "<image> What is it?" begin a text; "<video> does not play" speaks of HTML.
    """
    tokens = match[0]
    before = prose[: match.start()].rstrip(" \t")
    after = prose[match.end() :]
    fills_lines = before[-1:] in ("", "\n") and after[:1] in ("", "\r", "\n")
    if fills_lines:
        return True
    is_html = match[1] in ("video", "audio")
    if not before.strip():
        follows_directly = not tokens[-1].isspace()
        is_letter = after[0].isalnum()
        if follows_directly or not after[0].isascii():
            return is_letter
        return is_letter and not is_html and not after[0].islower()
    if not after.strip():
        return before[-1] in (".?!。？！：" if is_html else ".?!:。？！：")
    return False
