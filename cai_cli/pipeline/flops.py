"""What a road costs: tokens -> GPU-hours. `estimate` counts the tokens, of the paper's own run too (`docs/scale.md`).

A forward pass takes 2 operations a parameter and token, a training step 6 (Kaplan et al. 2020, arXiv 2001.08361); how
many of a GPU's operations are put to use depends on the kind of work. Attention over long contexts is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MODELS: Mapping[str, float] = {"8B": 8e9, "70B": 70e9}  # parameters
H100_FLOPS = 989e12  # dense bfloat16, NVIDIA's data sheet of the H100 SXM
# Shares of that: reading and training as Llama 3 was trained (38-43%, arXiv 2407.21783, table 4); writing, which waits
# for memory, as half of what TensorRT-LLM 0.5 writes in FP8 (its performance page: a 7B model 9,193 tokens a second on
# one H100, 70B 3,317 on four, 128 tokens in and 128 out).
READING, WRITING, TRAINING = 0.40, 0.06, 0.40
ASSUMED = (
    f"H100 hours, bfloat16, at {READING:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s in reading, {WRITING:.0%} in writing "
    f"and {TRAINING:.0%} in training; no prefix caching; other models in proportion to their parameters"
)
ROW_BYTES = 400  # of names, ids and JSON in a row, beside its text


@dataclass(frozen=True)
class Work:
    """Tokens that a step reads (prompts, comparisons, scores), writes (replies) and trains on."""

    prompt_tokens: float = 0.0
    new_tokens: float = 0.0
    trained_tokens: float = 0.0

    def gpu_hours(self, parameters: float) -> float:
        operations = (
            2 * self.prompt_tokens / READING + 2 * self.new_tokens / WRITING + 6 * self.trained_tokens / TRAINING
        )
        return operations * parameters / H100_FLOPS / 3600


def total(works: Sequence[Work]) -> Work:
    return Work(
        sum(work.prompt_tokens for work in works),
        sum(work.new_tokens for work in works),
        sum(work.trained_tokens for work in works),
    )
