"""An engine that reads its answers from a JSONL file: for tests, examples and dry runs of a whole road.

Each row: `contains` (text that the prompt must hold, null for any), `replies` (one is taken by the ask's seed),
`finish_reason`, `scores` (log-probabilities of the options, in their order), `seconds` (how long an answer takes).
The first row that matches answers.
"""

import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field

from cai_cli.common.errors import CaiError
from cai_cli.data.formats import render_transcript
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import Row
from cai_cli.engines.base import Completion, Engine, GenerationRequest, LogprobRequest, RequestFailure, Sampling, Text


class ScriptLine(Row):
    contains: str | None = None
    replies: list[str] = Field(default=[])
    finish_reason: str = "stop"
    scores: list[float] | None = None
    seconds: float = Field(default=0.0, ge=0)


class ScriptedEngine(Engine):
    """Deterministic: the same ask gets the same answer."""

    def __init__(self, file: str, batch_size: int = 64) -> None:
        self.batch_size = batch_size
        self.lines = [line for _, line in read_rows(file, rows_of(ScriptLine))]
        if not self.lines:
            raise CaiError(f"{file} holds no scripted answers")
        self.sha256 = sha256(Path(file).read_bytes()).hexdigest()

    def identity(self) -> dict[str, Any]:
        return {"engine": "scripted", "fingerprint": self.sha256}

    def speaks_chat(self) -> bool:
        return True

    def _line(self, text: Text) -> ScriptLine | None:
        flat = text if isinstance(text, str) else render_transcript(text)
        line = next((x for x in self.lines if x.contains is None or x.contains in flat), None)
        if line and line.seconds:
            time.sleep(line.seconds)
        return line

    def generate(self, asks: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        return [self._reply(ask) for ask in asks]

    def _reply(self, ask: GenerationRequest) -> Completion | RequestFailure:
        line = self._line(ask.text)
        if line is None or not line.replies:
            return RequestFailure("the script holds no reply for this prompt")
        return Completion(line.replies[ask.seed % len(line.replies)], line.finish_reason)

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        return [self._scores(request) for request in requests]

    def _scores(self, question: LogprobRequest) -> list[float] | RequestFailure:
        line = self._line(question.text)
        if line is None or line.scores is None or len(line.scores) != len(question.options):
            return RequestFailure("the script holds no scores for this question")
        return line.scores
