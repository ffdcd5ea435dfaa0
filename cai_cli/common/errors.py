"""Every error that `cai` raises on purpose. The command line prints it as one line with its hint, and exits.

Each error has a stable `code`, such as `other-run`, that scripts and tests compare instead of the message; `--json`
shows it. docs/errors.md lists the codes.
"""

from typing import Any


class CaiError(Exception):
    """A failure that the user can act on. Exit code 1.

    Attributes:
        message: What happened and where, in one line.
        hint: What to do about it, in one line, or None.
        code: Stable name of this kind of failure, in kebab case.
        in_summary: Whether the JSON summary of the run, printed before, contains the error.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, *, code: str = "failed") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
        self.in_summary = False

    def as_json(self) -> dict[str, Any]:
        """The error as `--json` prints it."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class UsageError(CaiError):
    """The command line itself is wrong: an invalid value, or two options that exclude each other. Exit code 2."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None, *, code: str = "usage") -> None:
        super().__init__(message, hint, code=code)


class InvalidRow(CaiError):
    """A line of an input file that is not a valid row. The message starts with `file:line`.

    Attributes:
        file: The input as named on the command line.
        line: The line, counted from 1.
        reason: Why it is not valid.
    """

    def __init__(
        self, file: str, line: int, reason: str, hint: str | None = None, *, code: str = "invalid-row"
    ) -> None:
        super().__init__(f"{file}:{line}: {reason}", hint, code=code)
        self.file, self.line, self.reason = file, line, reason

    def as_json(self) -> dict[str, Any]:
        return super().as_json() | {"file": self.file, "line": self.line, "reason": self.reason}


class RowError(CaiError):
    """A value that is not a valid row, before its file and line are known."""

    def __init__(self, message: str, hint: str | None = None, *, code: str = "invalid-row") -> None:
        super().__init__(message, hint, code=code)


class UnusableRow(RowError):
    """A valid row that no command can use, such as one with a tool call. A reader that can reject rows goes on after it
    without `--skip-invalid`."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint, code="unusable-row")
