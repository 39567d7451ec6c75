"""Languages by script, against Unicode's own names of the letters. Seen red: kana not counted with han."""

import random
import unicodedata

from data_prep.common.language import detect_language


def test_languages_by_script():
    """Against Unicode's own names of the letters."""

    def named(text):
        words = {"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "LATIN": "en"}
        found = [words.get(unicodedata.name(char, "").split()[0], "und") for char in text if char.isalpha()]
        counts = {lang: found.count(lang) for lang in {*found}}
        if counts.get("ja", 0) > counts.get("zh", 0) / 10:
            counts["ja"] += counts.pop("zh", 0)
        return max(counts, key=counts.get) if counts else "und"

    rng = random.Random(3)
    letters = ["你好吗世界", "abcéß", "これはカタ", "안녕하세", "Приве𐍈", "12 ,。！😀"]
    for _ in range(500):
        text = "".join(rng.choice(rng.choice(letters)) for _ in range(rng.choice([1, 4, 31])))
        zh, en, ja, ko, other = [sum(char in kind for char in text) for kind in letters[:5]]
        totals = sorted([zh if ja <= zh / 10 else 0, en, ja + (zh if ja > zh / 10 else 0), ko, other])
        if totals[-1] == totals[-2] > 0:
            continue  # a draw
        assert detect_language(text) == named(text), text
