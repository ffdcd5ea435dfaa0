"""Estimates the cost of a step before it runs: rows and tokens, and from them operations and GPU-hours.

A forward pass takes 2 operations a parameter and token, a training step 6 (Kaplan et al. 2020, arXiv 2001.08361). The
share of a GPU's peak that is used depends on the kind of work. Attention over long contexts is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

MODELS: Mapping[str, float] = {"8B": 8e9, "70B": 70e9}  # parameters
H100_FLOPS = 989e12  # dense bfloat16, NVIDIA's data sheet of the H100 SXM
# Shares of the peak: prefill and training as in the training of Llama 3 (38-43%, arXiv 2407.21783, table 4); decoding,
# which is bound by memory, at half the throughput of TensorRT-LLM 0.5 in FP8 (its performance page: 9,193 tokens a
# second for a 7B model on one H100, 3,317 for 70B on four, with 128 tokens in and 128 out).
PREFILL, DECODING, TRAINING = 0.40, 0.06, 0.40
ASSUMPTIONS = (
    f"H100 hours, bfloat16, at {PREFILL:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s in prefill, {DECODING:.0%} in decoding "
    f"and {TRAINING:.0%} in training; no prefix caching; other models in proportion to their parameters"
)
ROW_BYTES = 400  # of field names, ids and JSON syntax in a row, without its texts
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class TokenCounts:
    """Tokens that a step reads (prompts, comparisons, scored replies), writes (replies) and trains on."""

    prompt_tokens: float = 0.0
    new_tokens: float = 0.0
    trained_tokens: float = 0.0

    def gpu_hours(self, parameters: float) -> float:
        """H100 hours for a model with this number of parameters."""
        operations = (
            2 * self.prompt_tokens / PREFILL + 2 * self.new_tokens / DECODING + 6 * self.trained_tokens / TRAINING
        )
        return operations * parameters / H100_FLOPS / 3600

    def __sub__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(
            self.prompt_tokens - other.prompt_tokens,
            self.new_tokens - other.new_tokens,
            self.trained_tokens - other.trained_tokens,
        )


def total(counts: Sequence[TokenCounts]) -> TokenCounts:
    """The sum of several steps."""
    return TokenCounts(
        sum(one.prompt_tokens for one in counts),
        sum(one.new_tokens for one in counts),
        sum(one.trained_tokens for one in counts),
    )


@dataclass(frozen=True)
class RowFlow:
    """The rows that a step writes.

    Attributes:
        rows: How many there are.
        per_prompt: Replies to each prompt.
        prompt_tokens: Mean length of a prompt.
        reply_tokens: Mean length of a reply.
        rounds: Rounds of revision in each row.
        texts: Replies, critiques and revisions in each row.
        sources: Input files or models that are compared, joined by prompt.
    """

    rows: int
    per_prompt: int
    prompt_tokens: float
    reply_tokens: float
    rounds: int = 0
    texts: int = 0
    sources: int = 1

    @property
    def bytes(self) -> float:
        """Size of the file that holds these rows."""
        text = CHARACTERS_PER_TOKEN * (self.prompt_tokens + self.texts * self.reply_tokens)
        return self.rows * (ROW_BYTES + text)


def joined(flows: Sequence[RowFlow]) -> RowFlow:
    """The rows of several files as one, with the mean lengths; the rest is that of the first.

    >>> joined([RowFlow(3, 1, 10.0, 20.0), RowFlow(1, 1, 30.0, 60.0)])
    RowFlow(rows=4, per_prompt=1, prompt_tokens=15.0, reply_tokens=30.0, rounds=0, texts=0, sources=1)
    """
    rows = sum(flow.rows for flow in flows)
    prompt, reply = (
        sum(flow.rows * length for flow, length in zip(flows, lengths, strict=True)) / max(1, rows)
        for lengths in ([flow.prompt_tokens for flow in flows], [flow.reply_tokens for flow in flows])
    )
    return replace(flows[0], rows=rows, prompt_tokens=prompt, reply_tokens=reply)


@dataclass(frozen=True)
class StepCost:
    """What one step costs.

    Attributes:
        rows: Rows that it processes.
        requests: Requests that it sends.
        tokens: Its tokens.
        output: The rows that it writes.
        alone: Those of its tokens that one process handles while the others wait.
    """

    rows: int
    requests: int
    tokens: TokenCounts
    output: RowFlow
    alone: TokenCounts = TokenCounts()
