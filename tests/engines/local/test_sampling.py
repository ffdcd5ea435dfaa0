"""Sampled tokens follow the model's distribution, by seed."""

import pytest
import torch
from local_models import engine, generation_requests, prompt_ids, reference, replies

from cai_cli.engines.base import GenerationRequest, Sampling
from cai_cli.engines.local import sampling


def test_the_seed_alone_decides_the_noise() -> None:
    request = generation_requests()[1]
    same = [GenerationRequest(request.text, seed) for seed in (5, 6, 5)]
    first, second, again = (r.text for r in replies("llama", None, same, Sampling(20)))
    assert first == again != second


def test_sampled_tokens_follow_the_models_distribution() -> None:
    request, count = generation_requests()[1], 4000
    with torch.no_grad():
        logits = reference().forward(torch.tensor([prompt_ids(engine(), request)])).logits[0, -1]
    expected = torch.softmax(logits / 1.5, -1)
    noise = torch.tensor([float(sampling.uniforms(seed, 1)[0]) for seed in range(count)], dtype=torch.float64)
    drawn = sampling.draw(logits.expand(count, -1), noise, Sampling(temperature=1.5))
    observed = torch.bincount(drawn, minlength=len(expected)) / count
    assert (observed - expected).abs().sum() < 0.25 < (observed - 1 / len(expected)).abs().sum()


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log().repeat(1000, 1)
    noise = torch.linspace(0, 0.9999, 1000, dtype=torch.float64)
    kept = [set(sampling.draw(logits, noise, Sampling(top_p=p)).tolist()) for p in (0.0, 0.49, 0.6, 0.8, 0.95, 1.0)]
    assert kept == [{1}, {1}, {1, 3}, {1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}]
    steps = torch.linspace(0, -1, 5000).expand(2, -1)  # nearly flat: more tokens are kept than are looked at first
    count = int((steps[0].double().softmax(-1).cumsum(-1) < 0.9).sum()) + 1
    last = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampling.draw(steps, last, Sampling(top_p=0.9)).tolist() == [0, pytest.approx(count - 1, abs=1)]


def test_a_token_of_no_weight_is_never_drawn() -> None:
    logits = torch.full((3, 600), -torch.inf)
    logits[:, [3, 300]] = 0.0
    noise = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sampling.draw(logits, noise, Sampling()).tolist() == [3, 300, 300]


def test_a_limit_inside_a_character_leaves_no_replacement_mark() -> None:
    tokenizer, text = engine().tokenizer, "\u68a8\u3067\u3059\u3002\U0001f350"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for limit in range(1, len(ids)):
        builder = sampling.CompletionBuilder(tokenizer, {2}, limit)
        row = sampling.ActiveSequence(0, generation_requests()[1], (1,), [0.0] * limit)
        for token in ids[:limit]:
            builder.add(row, token)
        assert row.completion
        assert text.startswith(row.completion.text)
        assert (row.completion.finish_reason, row.completion.new_tokens) == ("length", limit)


def test_a_stop_string_after_part_of_a_character_ends_a_reply_without_the_part() -> None:
    tokenizer = engine().tokenizer
    ids = tokenizer("a\u68a8", add_special_tokens=False)["input_ids"][:-1] + tokenizer("STOP")["input_ids"]
    row = sampling.ActiveSequence(0, GenerationRequest("", 0, stop=("STOP",)), (1,), [0.0] * 99)
    builder = sampling.CompletionBuilder(tokenizer, {2}, 99)
    for token in ids:
        builder.add(row, token)
    assert row.completion
    assert (row.completion.text, row.completion.finish_reason) == ("a", "length")
