"""An engine that reads its answers from a JSONL file, for tests, examples and dry runs of the pipeline.

Each request is answered by the first line of the file that matches its prompt (see `ScriptLine`).
"""

import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field

from cai_cli.common.errors import CaiError
from cai_cli.data.jsonl import read_rows, rows_of
from cai_cli.data.schema import Row
from cai_cli.data.transcripts import render_transcript
from cai_cli.engines.base import Completion, Engine, GenerationRequest, LogprobRequest, RequestFailure, Sampling, Text
from cai_cli.engines.thoughts import without_thoughts


class ScriptLine(Row):
    """One scripted answer.

    Attributes:
        contains: Text that the prompt must contain; null matches every prompt.
        replies: Texts to answer with; the request's seed chooses one.
        finish_reason: "stop" or "length".
        scores: The log-probabilities of the options, in their order.
        seconds: How long an answer takes.
    """

    contains: str | None = None
    replies: list[str] = Field(default=[])
    finish_reason: str = "stop"
    scores: list[float] | None = None
    seconds: float = Field(default=0.0, ge=0)


class ScriptedEngine(Engine):
    """Implements `Engine`. The same request always gets the same answer."""

    def __init__(self, file: str, batch_size: int = 64) -> None:
        """Read the script.

        Raises:
            InvalidRow: A line is not a valid ScriptLine.
            CaiError: The file cannot be read, or holds no lines.
        """
        self.batch_size = batch_size
        self.lines = [line for _, line in read_rows(file, rows_of(ScriptLine))]
        if not self.lines:
            raise CaiError(f"{file} holds no scripted answers", code="no-rows")
        self.sha256 = sha256(Path(file).read_bytes()).hexdigest()

    def identity(self) -> dict[str, Any]:
        return {"engine": "scripted", "fingerprint": self.sha256}

    def supports_chat(self) -> bool:
        return True

    def _line(self, text: Text) -> ScriptLine | None:
        prompt = text if isinstance(text, str) else render_transcript(text)
        line = next((x for x in self.lines if x.contains is None or x.contains in prompt), None)
        if line and line.seconds:
            time.sleep(line.seconds)
        return line

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        return [self._reply(request) for request in requests]

    def _reply(self, request: GenerationRequest) -> Completion | RequestFailure:
        line = self._line(request.text)
        if line is None or not line.replies:
            return RequestFailure("the script holds no reply for this prompt")
        return without_thoughts(Completion(line.replies[request.seed % len(line.replies)], line.finish_reason))

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        return [self._scores(request) for request in requests]

    def _scores(self, request: LogprobRequest) -> list[float] | RequestFailure:
        line = self._line(request.text)
        if line is None or line.scores is None or len(line.scores) != len(request.options):
            return RequestFailure("the script holds no scores for this question")
        return line.scores
