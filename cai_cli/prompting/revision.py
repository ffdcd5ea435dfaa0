"""Requests for critiques and revisions (paper section 3.1)."""

from collections.abc import Sequence

from cai_cli.constitution.schema import CritiqueExample
from cai_cli.data.schema import Message
from cai_cli.data.transcripts import escape_headings, render_transcript
from cai_cli.prompting.base import RAW_STOPS, PromptFormat, Request, assistant, user

# --- critique and revision, paper section 3.1 ---------------------------------------------------------------------


def critique_request(
    conversation: Sequence[Message], request: str, examples: Sequence[CritiqueExample], form: PromptFormat
) -> Request:
    """The request for a critique of the last assistant turn.

    Args:
        conversation: Ends with the reply to criticise.
        request: The principle's critique request.
        examples: Few-shot examples.
        form: Chat or raw.
    """
    if form == "chat":
        return Request([*_with_examples(conversation, examples), user(request)])
    text = "".join(_raw_example(e) for e in examples) + render_transcript(conversation)
    return Request(f"{text}\n\nCritiqueRequest: {request}", prefill="\n\nCritique:", stop=RAW_STOPS)


def revision_request(
    conversation: Sequence[Message],
    critique: tuple[str, str] | None,
    request: str,
    examples: Sequence[CritiqueExample],
    form: PromptFormat,
) -> Request:
    """The request for a revision of the last assistant turn.

    Args:
        conversation: Ends with the reply to revise.
        critique: The critique request and the critique, or None to revise without one (paper section 3.5).
        request: The principle's revision request.
        examples: Few-shot examples.
        form: Chat or raw.
    """
    if form == "chat":
        between = [user(critique[0]), assistant(critique[1])] if critique else []
        earlier = _with_examples(conversation, examples, with_critique=critique is not None)
        return Request([*earlier, *between, user(request)])
    text = "".join(_raw_example(e, with_critique=critique is not None) for e in examples)
    text += render_transcript(conversation)
    if critique:
        text += f"\n\nCritiqueRequest: {critique[0]}\n\nCritique: {escape_headings(critique[1])}"
    return Request(f"{text}\n\nRevisionRequest: {request}", prefill="\n\nRevision:", stop=RAW_STOPS)


def _with_examples(
    conversation: Sequence[Message], examples: Sequence[CritiqueExample], with_critique: bool = True
) -> list[Message]:
    system = [m for m in conversation if m.role == "system"]
    turns = [m for m in conversation if m.role != "system"]
    example_turns: list[Message] = []
    for e in examples:
        example_turns += e.messages
        if with_critique:
            example_turns += [user(e.critique_request), assistant(e.critique)]
        example_turns += [user(e.revision_request), assistant(e.revision)]
    return [*system, *example_turns, *turns]


def _raw_example(e: CritiqueExample, with_critique: bool = True) -> str:
    text = render_transcript(e.messages)
    if with_critique:
        text += f"\n\nCritiqueRequest: {e.critique_request}\n\nCritique: {e.critique}"
    return f"{text}\n\nRevisionRequest: {e.revision_request}\n\nRevision: {e.revision}"
