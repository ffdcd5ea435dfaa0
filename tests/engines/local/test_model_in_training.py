"""The engine around a model in training, against the engine that loads the same model."""

import torch
from local_models import engine, generation_requests, model_dir, prompt_ids

from cai_cli.engines.base import Sampling
from cai_cli.engines.local.model_in_training import engine_around
from cai_cli.models.loading import load_causal_lm, load_tokenizer


def test_a_model_in_training_answers_as_the_engine_does_and_is_unchanged_afterwards() -> None:
    whole = engine()
    trained, tokenizer = load_causal_lm(model_dir()), load_tokenizer(model_dir())
    trained.train()
    rows = [prompt_ids(whole, request) for request in generation_requests(4)]
    ids = torch.tensor([rows[0]])
    before = trained(ids).logits
    with engine_around(trained, tokenizer, None) as around:
        assert around.uses_prefix_cache
        assert not trained.training
        answered = around.generate_ids(rows, [1, 2, 3, 4], Sampling(8))
    assert answered == whole.generate_ids(rows, [1, 2, 3, 4], Sampling(8))
    after = trained(ids).logits
    assert torch.equal(after, before)
    after.sum().backward()
    assert trained.training
    assert all(parameter.grad is not None for parameter in trained.parameters())


def test_under_autocast_a_model_in_training_keeps_its_own_layers() -> None:
    trained = load_causal_lm(model_dir())
    attention, linear = trained.config._attn_implementation, trained.lm_head
    with torch.autocast("cpu", torch.bfloat16), engine_around(trained, None, None) as around:
        assert not around.uses_prefix_cache
        assert trained.config._attn_implementation == attention
        assert trained.lm_head is linear
