"""Positions that depend on the length of a row: a row's result does not depend on its batch."""

import pytest
import torch
from local_models import ROPE_LIMIT, engine, greedy_tokens, prompt_ids, reference

from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, Sampling
from cai_cli.engines.local import rope

TEXT = "how can the assistant help you with this conversation please " * 9


def requests(characters: tuple[int, ...]) -> list[GenerationRequest]:
    return [GenerationRequest(TEXT[:count], seed) for seed, count in enumerate(characters)]


# Rows that stay below the limit, rows that cross it while they grow, and rows that begin beyond it.
ACROSS = requests((20, 80, 152, 160, 176, 200, 240, 320))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_rows_on_both_sides_of_a_longrope_limit_equal_generate_in_any_batch(batch_size: int) -> None:
    e, sampling = engine("longrope", batch_size), Sampling(24, temperature=0)
    lengths = [len(prompt_ids(e, request)) for request in ACROSS]
    assert min(lengths) + 24 < ROPE_LIMIT < max(lengths)
    assert any(length < ROPE_LIMIT < length + 24 for length in lengths)
    for request, reply in zip(ACROSS, e.generate(ACROSS, sampling), strict=True):
        ids = prompt_ids(e, request)
        new = greedy_tokens("longrope", ids, 24)
        assert isinstance(reply, Completion)
        assert reply.text == e.tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")  # cut in a character
        assert reply.prompt_tokens == len(ids)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_option_scores_on_both_sides_of_the_limit_equal_plain_forward_passes(prefix_cache: bool) -> None:
    from local_models import model_dir

    from cai_cli.engines.local.engine import LocalEngine

    e = LocalEngine(str(model_dir("longrope")), batch_size=None, device="cpu", dtype="float32")
    if not prefix_cache:
        e.uses_prefix_cache = False
    wanted = [LogprobRequest(str(request.text), (" Yes", " No")) for request in ACROSS]
    for request, scores in zip(wanted, e.option_logprobs(wanted), strict=True):
        prompt = prompt_ids(e, GenerationRequest(request.text, 0))
        for option, score in zip(request.options, scores, strict=True):  # type: ignore[arg-type]
            whole = prompt_ids(e, GenerationRequest(f"{request.text}{option}", 0))
            with torch.no_grad():
                logits = reference("longrope")(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
            expected = sum(float(logits[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
            assert score == pytest.approx(expected, abs=1e-4)


def test_rows_up_to_the_window_of_a_dynamic_rope_equal_generate_in_one_batch() -> None:
    e, sampling = engine("dynamic", 8), Sampling(24, temperature=0)
    wanted = requests((20, 60, 120, 200, 240, 250))
    assert max(len(prompt_ids(e, request)) for request in wanted) + 24 > 0.9 * e.window
    for request, reply in zip(wanted, e.generate(wanted, sampling), strict=True):
        ids = prompt_ids(e, request)
        new = greedy_tokens("dynamic", ids, 24)
        assert isinstance(reply, Completion)
        assert reply.text == e.tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")  # cut in a character


def test_a_model_with_fixed_positions_is_left_alone() -> None:
    model = reference("llama")
    assert rope.rope_limits(model) == []
    with rope.fixed_rope(model, None):
        assert model.model.rotary_emb.rope_type == "default"


def test_the_frequencies_follow_the_row_again_after_they_were_held_fixed() -> None:
    model, ids = reference("longrope"), torch.arange(3, 3 + ROPE_LIMIT + 1)[None]
    with torch.no_grad():
        long, short = model(ids).logits, model(ids[:, :5]).logits
        with rope.fixed_rope(model, None):
            assert not torch.allclose(model(ids[:, :5]).logits, short, atol=1e-3)
        with rope.fixed_rope(model, ROPE_LIMIT):
            assert not torch.allclose(model(ids).logits, long, atol=1e-3)
        assert torch.equal(model(ids).logits, long)
        assert torch.equal(model(ids[:, :5]).logits, short)
