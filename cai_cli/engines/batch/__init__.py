"""Answers from the batch files of a provider: OpenAI, Anthropic, and `vllm run-batch`.

A stage runs as usual. Its requests are answered from a store; a request without an answer is recorded, and once all are
known they are written to request files (`cai batch submit`). The provider's result files fill the store (`cai batch
collect`). A request is known by the hash of its content, so a stage needs no code for any of this.
"""

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai_cli.engines.batch.engine import BatchSession

active: ContextVar["BatchSession | None"] = ContextVar("active", default=None)
"""The batch that answers requests in place of a server; None where there is none."""
