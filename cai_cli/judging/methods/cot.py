"""Chain of thought: the model writes a rationale, then answers the multiple choice (paper section 4.1).

After a rationale the probability of the answer is mostly close to 0 or 1, so labels are clamped to 0.4,0.6 by default,
as in the paper (`--clamp`).
"""

from collections.abc import Sequence

from cai_cli.engines.base import GenerationRequest, LogprobRequest, RequestFailure
from cai_cli.judging.base import FeedbackModel, Judgement, PairComparison, normalised
from cai_cli.prompting.comparison import OPTIONS, answer_after, rationale_request


def cot(judge: FeedbackModel, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
    """Return one judgement for each comparison, in order; an empty rationale gives none."""
    prompts = [
        rationale_request(
            c.pair.prompt, c.principle.comparison, c.ordered_replies, judge.examples_for(c.pair), judge.prompt_format
        )
        for c in comparisons
    ]
    requests = [
        GenerationRequest(p.text, c.seed(judge.seed), p.prefill, p.stop, c.pair.key)
        for c, p in zip(comparisons, prompts, strict=True)
    ]
    rationales: list[str | RequestFailure] = []
    answers = []
    completions = judge.engine.generate(requests, judge.sampling)
    for c, prompt, completion in zip(comparisons, prompts, completions, strict=True):
        if isinstance(completion, RequestFailure):
            rationales.append(completion)
        elif not completion.text.strip():
            rationales.append(RequestFailure("empty rationale"))
        else:
            rationales.append(completion.text.strip())
            answer = answer_after(completion.text.rstrip(), prompt, judge.prompt_format)
            answers.append(LogprobRequest(answer.text, OPTIONS, answer.prefill, c.pair.key))
    logprobs = iter(judge.engine.option_logprobs(answers))
    return [r if isinstance(r, RequestFailure) else normalised(next(logprobs), r) for r in rationales]
