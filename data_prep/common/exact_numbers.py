"""Make `datasets` read and write numbers as they stand in the file.

`datasets` decodes its Json columns by pandas' parser, which bends decimals (0.7 becomes 0.7000000000000001), and where
the rows of a .jsonl file differ in their keys it stores them with ten decimals (1e-12 becomes 0.0). Python's own json
does neither. Each recipe holds the same lines, so that a lone copy trains the same numbers.
"""

import json

import pandas


def read_json_exactly() -> None:
    """Put json's loads and dumps in the place of those that `datasets` takes from pandas."""
    pandas.io.json.ujson_loads = json.loads
    pandas.io.json.ujson_dumps = json.dumps
