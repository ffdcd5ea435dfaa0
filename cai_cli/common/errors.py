"""Everything `cai` raises on purpose. `cli.main` prints such an error as one line with its hint and exits."""


class CaiError(Exception):
    """A failure the user can act on: one line of what happened, one line of the way out. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(CaiError):
    """The command line itself is wrong (a bad value, two options that exclude each other). Exit code 2."""

    exit_code = 2


class InvalidRow(CaiError):
    """A line of an input file that cannot be read as a row.

    The message starts with `file:line`, lines counted from 1.
    """

    def __init__(self, file: str, line: int, reason: str, hint: str | None = None) -> None:
        super().__init__(f"{file}:{line}: {reason}", hint)
        self.file, self.line, self.reason = file, line, reason


class RowError(CaiError):
    """A value that is no row, before it is known which file and line it came from."""
