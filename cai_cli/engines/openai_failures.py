"""How a request to a server fails: the server refuses it, or there is no answer."""

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from cai_cli.common.errors import RowError

# Refusals that concern the text of one prompt, however many prompts get the same words.
_ABOUT_THE_PROMPT = re.compile(
    r"content.?(filter|policy|management)|context.?length|invalid_prompt|moderation|safety|too long", re.IGNORECASE
)
_NO_CREDIT = re.compile(
    r"insufficient_quota|billing_hard_limit|billing_not_active|credit balance|insufficient credits", re.IGNORECASE
)
_REQUEST_ID = re.compile(r"[0-9A-Za-z_-]{16,}")
LONGEST_REASON = 2000  # characters of a refusal that are searched for parameters


class Refused(RowError):
    """A request that the server rejected.

    Attributes:
        reason: The whole error of the response, as JSON.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, code="request-failed")
        self.reason = reason

    @property
    def about_the_prompt(self) -> bool:
        """Whether the server objects to the text of the prompt: others may be accepted."""
        return _ABOUT_THE_PROMPT.search(self.reason) is not None

    @property
    def kind(self) -> str:
        """The message without the number of the request, equal for equal refusals."""
        return _REQUEST_ID.sub("", self.message)


class Failure(Exception):
    """A request without an answer.

    Attributes:
        transient: Whether other requests may still be answered.
        elsewhere: Whether another server may answer this one.
        limited: Whether the server takes no more requests for now.
        wait: The seconds for which it takes none, if it says so.
        url: The server, once known.
    """

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        code: str = "wrong-answer",
        transient: bool = False,
        elsewhere: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.transient, self.elsewhere = message, code, transient, elsewhere
        self.limited, self.wait = False, None  # type: bool, float | None
        self.url: str | None = None
        self.hint = hint or "finished rows are kept; when the server is back, run the same command again to resume"


def whole_reason(body: Any) -> str:
    """The error of a response as JSON, cut off where it is long."""
    return json.dumps(body, ensure_ascii=False)[:LONGEST_REASON]


def says_no_credit(reason: str) -> bool:
    """Whether a server refuses because the account's quota or credit is used up, which waiting does not change.

    >>> says_no_credit('{"code": "insufficient_quota"}'), says_no_credit('{"code": "rate_limit_exceeded"}')
    (True, False)
    """
    return _NO_CREDIT.search(reason) is not None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a response with status 429 asks to wait; None where it does not say.

    >>> retry_after({"retry-after": "7"}), retry_after({"retry-after-ms": "250"}), retry_after({"retry-after": "soon"})
    (7.0, 0.25, None)
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) / unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:
                continue
        if 0 < seconds < float("inf"):
            return seconds
    return None
