"""Requests for principles that explain a preference (inverse constitutional AI, Findeis et al., arXiv 2406.06560)."""

import re
from collections.abc import Sequence

from cai_cli.data.schema import Message
from cai_cli.data.transcripts import render_transcript
from cai_cli.prompting.base import PromptFormat, Request, user
from cai_cli.prompting.comparison import PREAMBLE, fence

START = "Choose the reply that"
_QUESTION = (
    "Which rule explains the preference? Name one difference between the two replies, in content, tone or style, that "
    f"also applies to other conversations. Answer with one short sentence that begins with: {START}"
)


def proposal_request(
    conversation: Sequence[Message], preferred: str, other: str, *, preferred_first: bool, form: PromptFormat
) -> Request:
    """The request for one principle by which the preferred reply wins; the answer continues the sentence `START`.

    Args:
        conversation: The conversation that both replies continue.
        preferred: The preferred reply.
        other: The other reply.
        preferred_first: Which of them comes first.
        form: Chat or raw.
    """
    replies = [f"\n\nThe preferred reply: {fence(preferred)}", f"\n\nThe other reply: {fence(other)}"]
    shown = "".join(replies if preferred_first else reversed(replies))
    text = f"{PREAMBLE}{render_transcript(conversation)}\n\n{shown}\n\n{_QUESTION}"
    if form == "raw":
        return Request(text, prefill=f"\n\nThe rule: {START}", stop=("\n",))
    return Request([user(text)], prefill=START, stop=("\n",))


def proposed_principle(answer: str) -> str | None:
    """The principle in the answer to a `proposal_request`, as one sentence; None where it holds none.

    Args:
        answer: The text after the prefill, or a whole answer.

    Examples:
        >>> proposed_principle(" is polite, and brief. It says"), proposed_principle("Choose the reply that")
        ('Choose the reply that is polite, and brief.', None)
    """
    text = re.sub(rf"^{START}\b", "", answer.strip().strip("\"'“”*").strip(), flags=re.IGNORECASE).lstrip(" :")
    sentence = re.split(r"(?<=[.!?])\s", text.partition("\n")[0].strip())[0].rstrip(" .\"'”*")
    return f"{START} {sentence}." if len(sentence.split()) >= 2 else None
