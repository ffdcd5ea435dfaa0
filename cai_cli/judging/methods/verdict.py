"""Verdict: the model writes the letter of the better reply, so a judgement is 0 or 1.

Departure: the paper uses log-probabilities; this method is for engines that do not return them.
"""

from collections.abc import Sequence

from cai_cli.engines.base import Completion, GenerationRequest, RequestFailure
from cai_cli.judging.base import FeedbackModel, Judgement, PairComparison
from cai_cli.prompting.base import PromptFormat
from cai_cli.prompting.comparison import OPTIONS, verdict_request
from cai_cli.prompting.verdicts import verdict_of


def verdict(judge: FeedbackModel, comparisons: Sequence[PairComparison]) -> list[Judgement | RequestFailure]:
    """Return one judgement for each comparison, in order; an answer without a letter gives none."""
    requests = []
    for c in comparisons:
        prompt = verdict_request(
            c.pair.prompt, c.principle.comparison, c.ordered_replies, judge.examples_for(c.pair), judge.prompt_format
        )
        requests.append(GenerationRequest(prompt.text, c.seed(judge.seed), prompt.prefill, prompt.stop, c.pair.key))
    return [_verdict(completion, judge.prompt_format) for completion in judge.engine.generate(requests, judge.sampling)]


def _verdict(completion: Completion | RequestFailure, form: PromptFormat) -> Judgement | RequestFailure:
    if isinstance(completion, RequestFailure):
        return completion
    letter = verdict_of(completion.text, form)
    return Judgement(float(letter == OPTIONS[0])) if letter else RequestFailure("no verdict in the answer")
