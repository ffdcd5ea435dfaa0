"""Checks generated critiques and revisions for the format errors of small models.

The checks look for unmistakable marks of an error, because every good answer that is thrown away biases the data:
`reply_markers` finds wrappers and critiques, `repetition` finds loops. A text that fails a check is sampled again with
another seed, `ATTEMPTS` times in all, and then its row is rejected with the last reason. Texts are never repaired:
stripping a wrapper would hide how often the model fails.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from cai_cli.common.seeds import seed_for
from cai_cli.engines.base import Completion, Engine, GenerationRequest, RequestFailure, Sampling
from cai_cli.phase1_supervised.repetition import repeated_text
from cai_cli.phase1_supervised.reply_markers import is_critique, is_wrapped

ATTEMPTS = 4  # samples per request, the first included


def critique_problem(text: str) -> str | None:
    """Why `text` is not usable as a critique, or None if it is."""
    if not text.strip():
        return "empty critique"
    return _repetition(text, "critique")


def revision_problem(text: str, request: str, user_message: str = "") -> str | None:
    """Why `text` is not usable as a revision, or None if it is.

    Args:
        text: The model's answer.
        request: The revision request of the principle, which small models sometimes repeat.
        user_message: The user's last message.
    """
    if not text.strip():
        return "empty revision"
    if is_wrapped(text, user_message):
        return "wrapped revision"
    if is_critique(text):
        return "a critique in place of a revision"
    if _repeats_the_request(text, request):
        return "the request repeated in place of a revision"
    return _repetition(text, "revision")


def _repeats_the_request(text: str, request: str) -> bool:
    """Whether a text starts with the request, or holds it where it is too long to be there by chance."""
    answer, repeated = text.casefold(), request.strip().casefold()
    starts_with_it = answer.lstrip(" \n\"'*([").startswith(repeated)
    return bool(repeated) and (starts_with_it or (len(repeated.split()) >= 5 and repeated in answer))


def _repetition(text: str, what: str) -> str | None:
    repeated = repeated_text(text)
    return None if repeated is None else f"repeated text in the {what}: {repeated!r}"


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
        kind, mark, details = reason.partition(": ")  # rejected rows are counted by the text before the colon
        answers[index] = RequestFailure(f"{kind}, {attempt} attempts{mark}{details}")
    return answers
