"""Checks generated critiques and revisions for the format errors of small models.

A text that fails a check is sampled again with another seed, `ATTEMPTS` times in all, and then its row is rejected with
the last reason. Texts are never repaired: stripping a wrapper would hide how often the model fails.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from cai_cli.common.seeds import seed_for
from cai_cli.engines.base import Completion, Engine, GenerationRequest, RequestFailure, Sampling

ATTEMPTS = 4  # samples per request, the first included

_WRAPPER = re.compile(
    r"""^\W*(sure|certainly|of\ course|okay|ok|absolutely)?\W*
        ((here\ is|here's|here\ are|this\ is|below\ is)\b[^.\n]{0,80}
            \b(revis|rewrit|updat|improv|edit|reword|version)\w*
        |(revised|rewritten|updated|improved)\ (reply|response|answer|version)\b[^.\n]{0,40}:)""",
    re.IGNORECASE | re.VERBOSE,
)
_ABOUT_THE_REPLY = re.compile(
    r"""^\W*
        ((the|this|that)\ (reply|response)
        |(the|this|that|my)\ (last|previous|preceding|original|above|initial|first)\ (reply|response|answer)
        |(your|the\ assistant's|the\ ai's)\ (\w+\ )?(reply|response|answer))
        \ (is|was|does|did|could|should|would|contains?|fails?|lacks?|needs?|encourages?|promotes?|may|might|can|has|had
        |seems?|appears?|provides?|provided|suggests?|implies)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_LABEL = re.compile(r"^\W*critique\s*:|critique\s?request\s*:|revision\s?request\s*:", re.IGNORECASE)
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]?")


def critique_problem(text: str) -> str | None:
    """Why `text` is not usable as a critique, or None if it is."""
    if not text.strip():
        return "empty critique"
    return _repetition(text, "critique")


def revision_problem(text: str, request: str) -> str | None:
    """Why `text` is not usable as a revision, or None if it is.

    Args:
        text: The model's answer.
        request: The revision request of the principle, which small models sometimes repeat.
    """
    if not text.strip():
        return "empty revision"
    if _LABEL.search(text) or _ABOUT_THE_REPLY.search(text):
        return "a critique in place of a revision"
    if _WRAPPER.search(text):
        return "wrapped revision"
    if request.strip().lower() in text.lower():
        return "the request repeated in place of a revision"
    return _repetition(text, "revision")


def _repetition(text: str, what: str) -> str | None:
    """Detects text that repeats itself: a sentence of at least four words three times, or the same six words in a row
    four times (a loop without a full stop)."""
    sentences = (s.strip().lower() for s in _SENTENCE.findall(text))
    counts = Counter(s for s in sentences if len(s.split()) >= 4)
    words = text.lower().split()
    runs = Counter(tuple(words[i : i + 6]) for i in range(len(words) - 5))
    looped = max(counts.values(), default=0) >= 3 or max(runs.values(), default=0) >= 4
    return f"repeated sentence in the {what}" if looped else None


def generate_checked(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    problem: Callable[[int, str], str | None],
) -> list[Completion | RequestFailure]:
    """Generate one answer for each request, sampling again where an answer fails a check.

    Args:
        engine: The model.
        requests: What to generate.
        sampling: How tokens are sampled. At temperature 0 there is only one attempt.
        problem: Called with the index of a request and its answer; returns why the answer fails, or None.

    Returns:
        One answer for each request, in order. An answer that fails `ATTEMPTS` times becomes a RequestFailure with the
        last reason. A RequestFailure of the engine is final.
    """
    answers: list[Completion | RequestFailure] = list(engine.generate(requests, sampling))
    for attempt in range(1, ATTEMPTS + 1):
        failed = {
            index: reason
            for index, answer in enumerate(answers)
            if isinstance(answer, Completion) and (reason := problem(index, answer.text))
        }
        # Greedy decoding gives the same answer every time.
        if not failed or attempt == ATTEMPTS or sampling.temperature == 0:
            break
        retries = [replace(r, seed=seed_for(r.seed, "attempt", attempt)) for r in (requests[i] for i in failed)]
        for index, answer in zip(failed, engine.generate(retries, sampling), strict=True):
            answers[index] = answer
    for index, reason in failed.items():
        answers[index] = RequestFailure(f"{reason}, {attempt} attempts")
    return answers
