"""Which parameters of a request a server refuses, learnt from its refusals.

Hosted models differ in the sampling parameters that they take. A refusal that names a parameter of the request is
followed by the same request with the parameter renamed or left out. If the server accepts that, all later requests are
sent that way; if not, the refusal concerned the row.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RENAMED = {"max_tokens": "max_completion_tokens"}  # without a limit a reply could have any length
LEFT_OUT = ("seed", "top_p", "temperature", "stop")  # in this order where a refusal names several
_NAMES = {"stop": "stop(_sequences)?"}  # in the words of servers
_DEFAULTS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0}  # of the protocol

Changes = dict[str, str | None]  # parameter -> its other name, or None where it is left out
Accepted = tuple[str, Any]


@dataclass
class Parameters:
    """What is known about a server's parameters.

    Attributes:
        changes: The parameters that are renamed or left out.
        accepted: The parameters that it has taken, which later refusals do not concern.
    """

    changes: Changes = field(default_factory=dict)
    accepted: set[Accepted] = field(default_factory=set)

    def refused(self, reason: str, body: Mapping[str, Any], changes: Changes) -> Changes | None:
        """The changes to try next, or None where the refusal names no parameter that was sent.

        Args:
            reason: The server's words.
            body: The request before any changes.
            changes: The changes under which it was refused.
        """
        for name in (*RENAMED, *LEFT_OUT):
            sent = name in body and name not in changes and _use(name, body) not in self.accepted
            if sent and re.search(rf"(?<![A-Za-z_]){_NAMES.get(name, name)}(?![A-Za-z_])", reason):
                if name in RENAMED and "messages" not in body:
                    continue  # raw completions have no other name for it
                return changes | {name: RENAMED.get(name)}
        return None

    def learn(self, body: Mapping[str, Any], changes: Changes) -> list[str]:
        """Record that a request was answered under these changes.

        Returns:
            What is new about them, as messages.
        """
        new = {name: other for name, other in changes.items() if name not in self.changes}
        self.changes |= new
        self.accepted |= {_use(name, body) for name in (*RENAMED, *LEFT_OUT) if name in body and name not in changes}
        return [_message(name, other, body[name]) for name, other in new.items() if name in body]


def applied(body: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """The request under changes.

    >>> applied({"max_tokens": 9, "seed": 1, "top_p": 0.9}, {"max_tokens": "max_completion_tokens", "seed": None})
    {'max_completion_tokens': 9, 'top_p': 0.9}
    """
    names = {name: changes.get(name, name) for name in body}
    return {other: body[name] for name, other in names.items() if other is not None}


def _use(name: str, body: Mapping[str, Any]) -> Accepted:
    """A parameter as a server takes or refuses it: some take a temperature of 1 only."""
    return name, body[name] if name in _DEFAULTS else None


def _message(name: str, other: str | None, value: Any) -> str:
    if other is not None:
        return f"the server refuses {name}; it is sent as {other}"
    if name == "stop":
        return "the server refuses stop; replies are cut at the stop strings here"
    without_effect = "" if value == _DEFAULTS.get(name, value) else f", so {name} {value:g} has no effect"
    return f"the server refuses {name}; requests are sent without it{without_effect}"
