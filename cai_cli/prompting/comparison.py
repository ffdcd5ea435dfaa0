"""Requests to compare two replies (paper section 4.1)."""

import re
from collections.abc import Mapping, Sequence

from cai_cli.constitution.schema import ComparisonExample, PreferencePrinciple
from cai_cli.data.schema import Message, Role
from cai_cli.data.transcripts import render_transcript
from cai_cli.prompting.base import RAW_STOPS, PromptFormat, Request, assistant, user
from cai_cli.prompting.system import with_system

OPTIONS = ("A", "B")
# --- comparison, paper section 4.1 --------------------------------------------------------------------------------

PREAMBLE = "Consider the following conversation between a human and an assistant:"
_COT_PREAMBLE = "\n\nHuman: Consider the following conversation between a human (H) and an assistant (A):"
_COT_SPEAKERS: Mapping[Role, str] = {"user": "H", "assistant": "A", "system": "S"}
_THINK = "Let's think step by step:"
ANSWER = "The answer is: ("
_RAW_COT_ANSWER = "\n\nHuman:\nSo the answer is: ("


def comparison_request(
    conversation: Sequence[Message],
    comparison: str,
    options: Sequence[str],
    examples: Sequence[ComparisonExample],
    form: PromptFormat,
) -> Request:
    """The multiple-choice request for the better reply; the answer continues with one of the letters `OPTIONS`.

    Args:
        conversation: The conversation that both replies continue.
        comparison: The principle's question.
        options: The two replies.
        examples: Few-shot examples.
        form: Chat or raw.
    """
    if form == "chat":
        turns: list[Message] = []
        for e in examples:
            turns.append(user(_choice(e.messages, e.comparison or comparison, e.options)))
            turns.append(assistant(f"{ANSWER}{e.answer})"))
        return Request([*turns, user(_choice(conversation, comparison, options))], prefill=ANSWER)
    text = "".join(
        f"\n\n{_choice(e.messages, e.comparison or comparison, e.options)}\n\n{ANSWER}{e.answer})" for e in examples
    )
    return Request(f"{text}\n\n{_choice(conversation, comparison, options)}", prefill=f"\n\n{ANSWER}")


def rationale_request(
    conversation: Sequence[Message],
    comparison: str,
    options: Sequence[str],
    examples: Sequence[ComparisonExample],
    form: PromptFormat,
) -> Request:
    """The request for a chain of thought before the answer. Examples without a rationale are left out."""
    worked = [e for e in examples if e.rationale]
    if form == "raw":
        text = "".join(cot_example(e, e.comparison or comparison) for e in worked)
        text += _cot_choice(_COT_PREAMBLE, conversation, comparison, options)
        return Request(text, prefill=f"\n\nAssistant: {_THINK}", stop=RAW_STOPS)
    turns: list[Message] = []
    for e in worked:
        turns.append(user(_choice(e.messages, e.comparison or comparison, e.options)))
        turns.append(assistant(f"{_THINK} {e.rationale}\n\n{ANSWER}{e.answer})"))
    return Request(
        [*turns, user(_choice(conversation, comparison, options))], prefill=_THINK, stop=("\n\nThe answer is",)
    )


def answer_after(rationale: str, request: Request, form: PromptFormat) -> Request:
    """The request for the letter that follows the chain of thought `rationale` to `request`."""
    closing = _RAW_COT_ANSWER if form == "raw" else f"\n\n{ANSWER}"
    return Request(request.text, prefill=request.prefill + rationale + closing)


def cot_example(example: ComparisonExample, comparison: str) -> str:
    """A few-shot example with a chain of thought, in the published raw format."""
    question = _cot_choice(example.preamble or _COT_PREAMBLE, example.messages, comparison, example.options)
    rationale = example.rationale if example.preamble else f" {example.rationale}"
    return f"{question}\n\nAssistant: {_THINK}{rationale}{_RAW_COT_ANSWER}{example.answer})"


def verdict_request(
    conversation: Sequence[Message],
    comparison: str,
    options: Sequence[str],
    examples: Sequence[ComparisonExample],
    form: PromptFormat,
) -> Request:
    """The request to compare in words, for engines without log-probabilities (see `verdicts` for the answers)."""
    request = comparison_request(conversation, comparison, options, examples, form)
    if isinstance(request.text, str):
        return Request(request.text, prefill=request.prefill, stop=RAW_STOPS)
    *earlier, question = request.text
    instruction = (
        f"{question.content}\n\nAnswer with one line and no other word: The answer is: (A) or The answer is: (B)"
    )
    return Request([*earlier, user(instruction)])


def characters(principle: PreferencePrinciple) -> tuple[str, str]:
    """System prompts of an assistant that follows the principle and of one that breaks it.

    They are those of the constitution; a principle without them gets a general description.
    """
    following = principle.following or f"You give the replies that win by this rule: {principle.comparison}"
    breaking = principle.breaking or f"You give the replies that lose by this rule: {principle.comparison}"
    return following, breaking


def contrast_requests(
    conversation: Sequence[Message], principle: PreferencePrinciple, form: PromptFormat
) -> tuple[Request, Request]:
    """Requests to continue a conversation as an assistant that follows the principle, and as one that breaks it."""
    following, breaking = characters(principle)
    return _spoken_by(following, conversation, form), _spoken_by(breaking, conversation, form)


def _spoken_by(character: str, conversation: Sequence[Message], form: PromptFormat) -> Request:
    if form == "raw":
        return Request(f"{character}{render_transcript(conversation)}", prefill="\n\nAssistant: ")
    return Request(with_system(conversation, character))


def _choice(conversation: Sequence[Message], comparison: str, options: Sequence[str]) -> str:
    return comparison_text(conversation, comparison, [fence(text) for text in options])


def comparison_text(conversation: Sequence[Message], comparison: str, fenced: Sequence[str]) -> str:
    """The raw text of a comparison, with options that are already fenced."""
    return f"{PREAMBLE}{render_transcript(conversation)}\n\n\n{comparison} Options:{_lettered(fenced)}"


def _cot_choice(preamble: str, conversation: Sequence[Message], comparison: str, options: Sequence[str]) -> str:
    lettered = _lettered([fence(text) for text in options])
    return f"{preamble}{render_transcript(conversation, _COT_SPEAKERS)}\n\n{comparison}{lettered}"


def _lettered(fenced: Sequence[str]) -> str:
    return "".join(f"\n ({letter}) {text}" for letter, text in zip(OPTIONS, fenced, strict=True))


def fence(text: str) -> str:
    """`[[[text]]]`, with more brackets than any run of them in the text, so that a reply cannot close its own fence.

    A text that starts or ends with a bracket or a line break is put on separate lines. `options_of` is the inverse.

    >>> fence("see [[[1]]] for more")
    '[[[[see [[[1]]] for more]]]]'
    """
    longest = max((len(run) for run in re.findall(r"\[+|\]+", text)), default=0)
    width = max(3, longest + 1)
    apart = "\n" if text[:1] in ("[", "\n") or text[-1:] in ("]", "\n") else ""
    return "[" * width + apart + text + apart + "]" * width


def options_of(choice: str) -> tuple[str, str]:
    """The two options of a rendered comparison, regardless of the text in them and in the conversation.

    They are read from the end, after which no reply can place text.

    Raises:
        ValueError: The text does not end with two fenced options.
    """
    before, second = _last_option(choice, "B")
    return _last_option(before, "A")[1], second


def _last_option(text: str, letter: str) -> tuple[str, str]:
    width = len(text) - len(text.rstrip("]"))
    start = text.rfind("[" * width, 0, len(text) - width)
    opening = f"\n ({letter}) "
    if width < 3 or start < 0 or not text[:start].endswith(opening):
        raise ValueError(f"no fenced option ({letter}) at the end")
    inner = text[start + width : -width]
    if len(inner) >= 2 and inner[0] == inner[-1] == "\n":
        inner = inner[1:-1]
    return text[: start - len(opening)], inner
