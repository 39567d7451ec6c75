"""What stops a command and what stops a row."""


class UsageError(Exception):
    """What cannot be worked on at all: one sentence that says what, where and what to do. Exit code 2."""


class InvalidRow(ValueError):
    """A row that cannot be used. reason: the words it is counted under; detail: what was seen."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self):  # processes hand it to each other
        return InvalidRow, (self.reason, self.detail)
