"""False positives of the format checks on real replies, and their recall on planted errors.

    python bench/format_checks.py hh-rlhf.jsonl   # rows of HH-RLHF: `chosen` and `rejected` conversations

False positives: the last reply of the first 1,000 `chosen` conversations, and every reply of all conversations. Recall:
wrappers around those replies, critiques, and loops of their sentences, all from `tests/revision_texts.py`.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import itertools

from revision_texts import (
    CRITIQUES,
    UNSPACED_CRITIQUES,
    UNSPACED_SENTENCES,
    UNSPACED_WRAPPERS,
    WRAPPERS,
    loops,
)

from cai_cli.data.transcripts import parse_transcript
from cai_cli.phase1_supervised.format_checks import revision_problem
from cai_cli.prompting.base import user

REQUEST = "Please rewrite the assistant response to remove any and all harmful content."


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    chosen = [reply for row in rows if (reply := _replies(row["chosen"])[-1])[1].strip()][:1000]
    every = list({reply for row in rows for side in ("chosen", "rejected") for reply in _replies(row[side])})
    _report("false positives, last chosen replies", chosen, lambda problem: problem is not None)
    _report("false positives, all replies", every, lambda problem: problem is not None, show=8)
    plain = [(asked, text) for asked, text in chosen if not revision_problem(text, REQUEST)][:100]
    wrapped = [(asked, wrapper.format(text)) for asked, text in plain for wrapper in WRAPPERS]
    _report("recall, wrappers", wrapped, lambda problem: problem == "wrapped revision")
    _report("recall, critiques", [("", text) for text in CRITIQUES], lambda problem: "critique" in str(problem))
    sentences = [s for _, text in plain if 6 <= len((s := text.split(". ")[0]).split()) <= 25 and "\n" not in s]
    looped = [("", loop) for sentence in sentences for loop in loops(sentence.rstrip(".") + ".")]
    _report("recall, loops", looped, lambda problem: "repeated text" in str(problem))
    unspaced = [("", wrapper.format("。".join(UNSPACED_SENTENCES[:3]))) for wrapper in UNSPACED_WRAPPERS]
    _report("recall, wrappers without spaces", unspaced, lambda problem: problem == "wrapped revision")
    critiques = [("", text) for text in UNSPACED_CRITIQUES]
    _report("recall, critiques without spaces", critiques, lambda problem: "critique" in str(problem))
    looped = [("", loop) for sentence in UNSPACED_SENTENCES for loop in loops(sentence)]
    _report("recall, loops without spaces", looped, lambda problem: "repeated text" in str(problem))


def _replies(conversation: str) -> list[tuple[str, str]]:
    """The replies of a conversation, each with the message that it answers."""
    turns = [user(""), *parse_transcript(conversation)]
    return [(a.content, b.content) for a, b in itertools.pairwise(turns) if b.role == "assistant"]


def _report(what: str, texts: Iterable[tuple[str, str]], counts: Callable[[str | None], bool], show: int = 0) -> None:
    problems = [(revision_problem(text, REQUEST, asked), text) for asked, text in texts]
    found = sum(counts(problem) for problem, _ in problems)
    print(f"{what:36} {found:5} of {len(problems):5} {found / len(problems):7.2%}")
    for problem, text in [each for each in problems if each[0]][:show]:
        print(f"    {problem}: {text[:100]!r}")


if __name__ == "__main__":
    main()
