"""Weights in bfloat16 and int8 on a CPU: their products, and the replies of models that have them."""

from typing import Any

import pytest
import torch
from local_models import generation_requests, greedy_tokens, model_dir, prompt_ids, reference

from cai_cli.common.errors import UsageError
from cai_cli.engines import open_engine
from cai_cli.engines.base import Completion, LogprobRequest, Sampling
from cai_cli.engines.local import decode_kernels, reduced_weights, sampling
from cai_cli.engines.local import engine as local_engine
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.engines.local.prefix_cache import PrefixCache
from cai_cli.phase2_feedback.train_pm import TrainPmConfig

HAS_INT8 = bool(torch.cpu.get_capabilities().get("avx512_vnni"))
needs_int8 = pytest.mark.skipif(not HAS_INT8, reason="no AVX-512 VNNI")
DTYPES = ["bfloat16", pytest.param("int8", marks=needs_int8)]


def engine(family: str, dtype: str, batch_size: int | None = None) -> LocalEngine:
    return LocalEngine(str(model_dir(family)), batch_size=batch_size, device="cpu", dtype=dtype)


def texts(local: LocalEngine, sampling: Sampling) -> list[str]:
    answers = local.generate(generation_requests(), sampling)
    return [answer.text for answer in answers if isinstance(answer, Completion)]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Weights rounded to 8 bits with a scale for each output."""
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127  # the row of the padding token is zero
    return (weight / scales).round() * scales


# --- one layer ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["compiled", "torch"])
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(reduced_weights, "library", lambda: None)
    elif decode_kernels.library() is None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("size", [7, 24, 41, 160])
def test_a_row_is_split_into_15_bits_of_its_largest_number(size: int) -> None:
    x = torch.randn(9, size)
    x[0], x[1], x[2] = 0, x[1] * 1e20, x[2] * 1e-20
    parts, scales = reduced_weights.split(x)
    again = (parts[:9].double() + parts[9:18].double() / 254) * scales[:, None].double()
    assert bool(((again - x).abs().amax(1) <= 2**-15 * x.abs().amax(1)).all())


@needs_int8
@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_layer_gives_the_products_of_its_rounded_weights_and_a_row_the_same_bits_beside_any_rows(
    bias: bool,
) -> None:
    plain, x = torch.nn.Linear(24, 40, bias=bias), torch.randn(3, 9, 24)
    layer = reduced_weights._int8_layer()(plain)
    with torch.inference_mode():
        out = layer(x)
        plain.weight.copy_(rounded(plain.weight))
        assert torch.allclose(out, plain(x), atol=1e-4)
        assert torch.equal(layer(x[1:2, 3:4]), out[1:2, 3:4])
        assert torch.equal(layer(x[2]), out[2])


@needs_int8
@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_so_in_its_own_row(value: float) -> None:
    x = torch.randn(4, 24)
    x[1, 5] = value
    finite = reduced_weights._int8_layer()(torch.nn.Linear(24, 40))(x).detach().isfinite()
    assert finite.all(1).tolist() == [True, False, True, True]


# --- models -------------------------------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize("family", ["llama", "phi", "qwen2"])
def test_greedy_text_with_int8_weights_is_that_of_transformers_with_rounded_weights(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, plain = engine(family, "int8"), reference(family)
    for layer in plain.modules():
        if type(layer) is torch.nn.Linear:
            monkeypatch.setattr(layer, "weight", torch.nn.Parameter(rounded(layer.weight.detach())))
    for request, text in zip(generation_requests(), texts(local, Sampling(16, temperature=0)), strict=True):
        new = greedy_tokens(family, prompt_ids(local, request), 16)
        assert text == local.tokenizer.decode(new, skip_special_tokens=True).rstrip("\ufffd")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_scores_with_reduced_weights_are_near_those_in_float32(family: str, dtype: str) -> None:
    requests = [LogprobRequest("Which reply is better?", ("A", "B"), "") for _ in range(2)]
    scores = [torch.tensor(engine(family, kind).option_logprobs(requests)) for kind in ("float32", dtype)]
    assert 0 < float((scores[0] - scores[1]).abs().max()) < 0.1


def test_a_row_gets_the_same_text_in_batches_of_1_and_7() -> None:
    alone = texts(engine("llama", "bfloat16", 1), Sampling(12))
    assert texts(engine("llama", "bfloat16", 7), Sampling(12)) == alone


@needs_int8
def test_with_int8_weights_a_row_gets_another_token_beside_other_rows_only_at_a_near_tie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In prefill attention rounds with the rows beside it, and int8 rounds the result to 15 bits."""
    drawn: dict[float, tuple[int, float]] = {}  # noise -> the token, and how near the noise is to the choice of another

    def draw(logits: torch.Tensor, noise: torch.Tensor, *rest: Any) -> torch.Tensor:
        tokens = sampling.draw(logits, noise, *rest)
        distances = (logits.double().softmax(-1).cumsum(-1) - noise[:, None]).abs().amin(-1)
        drawn.update(zip(noise.tolist(), zip(tokens.tolist(), distances.tolist(), strict=True), strict=True))
        return tokens

    monkeypatch.setattr(local_engine, "draw", draw)
    texts(engine("llama", "int8", 1), Sampling(12))
    alone = dict(drawn)
    drawn.clear()
    texts(engine("llama", "int8", 7), Sampling(12))
    same = 0
    for request in generation_requests():
        for noise in sampling.uniforms(request.seed, 12).tolist():
            (token, distance), (other, other_distance) = alone[noise], drawn[noise]
            assert abs(distance - other_distance) < 1e-5
            if token != other:
                assert max(distance, other_distance) < 1e-5
                break  # from here on the row has another text
            same += 1
    assert same > 100


@pytest.mark.skipif(decode_kernels.library() is None, reason="no C compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_weights_take_the_compiled_decoding_step(dtype: str) -> None:
    local = engine("llama", dtype)
    assert local.uses_prefix_cache
    assert PrefixCache(local.model, (), 0).quick_step is not None


# --- choosing them ------------------------------------------------------------------------------------------------


@needs_int8
def test_the_identity_names_the_weights_and_that_the_rest_is_float32() -> None:
    plain, *reduced = (engine("llama", dtype).identity() for dtype in ("float32", "bfloat16", "int8"))
    for dtype, identity in zip(("bfloat16", "int8"), reduced, strict=True):
        assert identity == plain | {"dtype": dtype, "activations": "float32"}
    assert engine("gpt2", "bfloat16").identity() == engine("gpt2", "float32").identity() | {"dtype": "bfloat16"}


def test_int8_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(model: str, **options: Any) -> str:
        with pytest.raises(UsageError) as caught:
            open_engine(model, **{"batch_size": 1, "device": "cpu", "dtype": "int8"} | options).identity()
        return caught.value.code

    assert refusal("any", device="cuda") == "option-conflict"
    assert refusal("vllm:any") == "option-conflict"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert refusal(str(model_dir("gpt2"))) == "option-conflict"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert refusal(str(model_dir())) == "no-device"


def test_a_model_in_training_has_no_int8_weights() -> None:
    with pytest.raises(UsageError) as caught:
        TrainPmConfig.build({"input": "in.jsonl", "output": "out", "dtype": "int8"})
    assert caught.value.code == "invalid-option"
