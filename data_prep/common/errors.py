"""What stops a command, and what stops a row."""


class UsageError(Exception):
    """Input that a command cannot work on: one sentence that says what, where and what to do. Exit code 2."""


class InvalidRow(ValueError):
    """A row that cannot be used. reason: the words it is counted under; detail: what was seen in it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple:  # processes hand it to each other
        return InvalidRow, (self.reason, self.detail)
