"""The local engine against transformers itself, on tiny random models of several families."""

import pytest
import torch
from local_models import chat, engine, generation_requests, greedy_tokens, model_dir, prompt_ids, reference, replies

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.data.schema import Message
from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, RequestFailure, Sampling
from cai_cli.engines.local import prefix_cache
from cai_cli.engines.local.engine import LocalEngine

FAMILIES = [*sorted(prefix_cache.MODEL_TYPES), "gpt2"]


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers_generate_token_by_token(family: str) -> None:
    ours = replies(family, None, generation_requests(), Sampling(max_new_tokens=24, temperature=0))
    e = engine(family)
    for request, reply in zip(generation_requests(), ours, strict=True):
        ids = prompt_ids(e, request)
        new = greedy_tokens(family, ids, 24)
        assert reply.prompt_tokens == len(ids)
        assert reply.new_tokens == len(new)
        text = e.tokenizer.decode(new, skip_special_tokens=True)
        assert reply.text == text.rstrip("\ufffd")  # a random model ends inside characters
        assert reply.finish_reason == ("stop" if new[-1] == 2 and reply.text == text else "length")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("sampling", [Sampling(20), Sampling(20, temperature=0.7, top_p=0.9)])
def test_a_row_gets_the_same_text_in_batches_of_1_7_and_32_and_in_any_order(family: str, sampling: Sampling) -> None:
    wanted = generation_requests(33)
    alone = replies(family, 1, wanted, sampling)
    assert replies(family, 7, wanted, sampling) == alone
    assert replies(family, 32, wanted[::-1], sampling) == alone[::-1]


def test_a_waiting_row_takes_the_place_of_a_finished_one(monkeypatch: pytest.MonkeyPatch) -> None:
    live: list[int] = []
    step = prefix_cache.PrefixCache.step
    monkeypatch.setattr(
        prefix_cache.PrefixCache, "step", lambda memory, tokens: (live.append(len(tokens)), step(memory, tokens))[1]
    )
    wanted = [
        GenerationRequest(request.text, request.seed, request.prefill, stop=("e",) if i % 2 else ())
        for i, request in enumerate(generation_requests(12))
    ]
    answers = replies("llama", 4, wanted, Sampling(24))
    lengths = [answer.new_tokens for answer in answers]
    assert min(lengths) < 12 < max(lengths)
    assert sum(live) == sum(lengths) - len(lengths)  # the first token of each comes with its prompt
    assert len(live) < 1.5 * sum(live) / 4
    assert max(live) == 4


def test_rows_wait_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = replies("llama", None, generation_requests(), Sampling(20))
    small = LocalEngine(str(model_dir()), batch_size=None, device="cpu", dtype="float32")
    vars(small)["max_cached_tokens"] = 300
    made: list[int] = []
    reserve = prefix_cache.PrefixCache._reserve

    def watched(memory: prefix_cache.PrefixCache, rows: int, columns: int) -> None:
        reserve(memory, rows, columns)
        made.append(memory.capacity[0] * memory.capacity[1])

    monkeypatch.setattr(prefix_cache.PrefixCache, "_reserve", watched)
    assert small.generate(generation_requests(), Sampling(20)) == alone
    assert max(made) <= 300


def test_the_end_of_turn_ends_a_reply_and_is_not_part_of_it() -> None:
    forced = LocalEngine(str(model_dir()), batch_size=None, device="cpu", dtype="float32")
    greedy = replies("llama", None, generation_requests(), Sampling(24, temperature=0))
    new = reference().generate(
        torch.tensor([prompt_ids(forced, generation_requests()[1])]), do_sample=False, max_new_tokens=3
    )
    forced.end_ids = frozenset({int(new[0, -1])})
    (reply,) = forced.generate([generation_requests()[1]], Sampling(24, temperature=0))
    assert isinstance(reply, Completion)
    assert (reply.finish_reason, reply.new_tokens) == ("stop", 3)
    assert greedy[1].text.startswith(reply.text)


def test_a_stop_string_is_cut_off_with_all_that_follows() -> None:
    request = generation_requests()[4]
    (whole,) = replies("llama", None, [request], Sampling(40))
    stop = whole.text[7:10]
    (cut,) = replies(
        "llama",
        None,
        [GenerationRequest(request.text, request.seed, request.prefill, ("never so", stop))],
        Sampling(40),
    )
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.new_tokens < whole.new_tokens


def test_a_prompt_that_does_not_fit_is_refused_with_its_numbers_and_the_others_are_answered() -> None:
    long = GenerationRequest("word " * 300, seed=0)
    tokens = len(engine().tokenizer(long.text)["input_ids"])
    refused, answered, empty = engine().generate(
        [long, generation_requests()[1], GenerationRequest("", 0)], Sampling(50)
    )
    assert refused == RequestFailure(f"does not fit the context window of 512: {tokens} tokens + 50 new ones")
    assert isinstance(answered, Completion)
    assert isinstance(empty, RequestFailure)


def test_a_prompt_that_just_fits_is_answered() -> None:
    tokens = len(prompt_ids(engine(), generation_requests()[1]))
    (reply,) = engine().generate([generation_requests()[1]], Sampling(512 - tokens, temperature=0))
    assert isinstance(reply, Completion)


def test_logits_that_are_not_finite_end_the_run() -> None:
    broken = LocalEngine(str(model_dir()), batch_size=None, device="cpu", dtype="float32")
    broken.model.model.norm.weight.data[3] = torch.nan
    for settings in (Sampling(4), Sampling(4, temperature=0)):
        with pytest.raises(CaiError) as error:
            broken.generate(generation_requests(), settings)
        assert error.value.code == "not-finite"
    with pytest.raises(CaiError) as error:
        broken.option_logprobs(logprob_requests())
    assert error.value.code == "not-finite"


# --- option log-probabilities -------------------------------------------------------------------------------------


def logprob_requests() -> list[LogprobRequest]:
    shared = [*chat("Please choose the response that is the most helpful.", "The answer is: (A)")]
    comparisons = [
        LogprobRequest(
            [*shared, Message(role="user", content="Consider " * i + "(A) or (B)?")], ("A", "B"), prefill="Answer: ("
        )
        for i in range(9)
    ]
    return [
        *comparisons,
        LogprobRequest(chat("How can I help?"), ("harmless, honest", "racist", "Yes", "")),
        LogprobRequest("Human: is it toxic?\n\nAnswer:", (" Yes", " No", " dangerous, or illegal content.")),
        LogprobRequest("Consider the follow", ("ing conversation", "ed", " No")),
    ]


def one_by_one(family: str, request: LogprobRequest) -> list[float]:
    """Log-probabilities from one plain forward pass per option, from where the options part from the prompt."""
    e = engine(family)
    prompt = prompt_ids(e, GenerationRequest(request.text, 0, request.prefill))
    wholes = [prompt_ids(e, GenerationRequest(request.text, 0, request.prefill + option)) for option in request.options]
    start = len(prompt)
    while any(whole[:start] != prompt[:start] for whole in wholes):
        start -= 1
    totals = []
    for whole in wholes:
        with torch.no_grad():
            logp = reference(family)(torch.tensor([whole])).logits[0].log_softmax(-1)
        totals.append(sum(float(logp[i - 1, whole[i]]) for i in range(start, len(whole))))
    return totals


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_equal_one_plain_forward_pass_per_option(family: str, batch_size: int) -> None:
    scores = engine(family, batch_size).option_logprobs(logprob_requests())
    for request, ours in zip(logprob_requests(), scores, strict=True):
        assert ours == pytest.approx(one_by_one(family, request), abs=1e-4)


def test_options_that_change_the_end_of_the_prompt_are_scored_from_the_same_token() -> None:
    e, request = engine(), logprob_requests()[-1]
    prompt = prompt_ids(e, GenerationRequest(request.text, 0))
    joined = prompt_ids(e, GenerationRequest(f"{request.text}{request.options[0]}", 0))
    assert joined[: len(prompt)] != prompt  # what makes this question a hard one
    (scores,) = e.option_logprobs([request])
    assert scores == pytest.approx(one_by_one("llama", request), abs=1e-4)


def test_a_question_that_does_not_fit_is_refused_and_the_others_are_scored() -> None:
    refused, scored = engine().option_logprobs([LogprobRequest("word " * 300, ("A", "B")), logprob_requests()[0]])
    assert isinstance(refused, RequestFailure)
    assert "does not fit the context window of 512" in refused.reason
    assert scored == pytest.approx(one_by_one("llama", logprob_requests()[0]), abs=1e-4)


# --- what rows share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(prefix_cache.MODEL_TYPES))
@pytest.mark.parametrize("start", [0, 40])
def test_rows_run_in_small_pieces_equal_whole_forward_passes(
    family: str, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache.PrefixCache, "_budget", 16)
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return [int(i) for i in torch.randint(3, 400, (count,), generator=generator)]

    common = some(start)
    rows = [common + some(count) for count in (3, 4, 7, 20, 37)]
    rows.insert(2, rows[1])
    plain = reference(family)
    assert engine(family).uses_prefix_cache
    memory = prefix_cache.PrefixCache(engine(family).model, tuple(common), 3)

    def join(new: list[list[int]]) -> None:
        found = list(memory.add([tuple(row) for row in new], [2] * len(new)))
        for row, logits in zip(new, found, strict=True):
            assert torch.allclose(logits, plain(torch.tensor([row])).logits[0, -2:], atol=1e-4)

    with torch.inference_mode():
        join(rows)
        memory.keep([0, 5, 2])
        rows = [rows[0], rows[5], rows[2]]
        for token in (7, 8, 9):
            rows = [[*row, token] for row in rows]
            for row, logits in zip(rows, memory.step(torch.tensor([token] * len(rows))), strict=True):
                assert torch.allclose(logits, plain(torch.tensor([row])).logits[0, -1], atol=1e-4)
            others = [common + some(count) for count in (50, 5)]
            join(others)
            rows += others
            memory.keep([4, 1, 2, 3] if len(rows) == 5 else range(len(rows)))
            rows = [rows[i] for i in (4, 1, 2, 3)] if len(rows) == 5 else rows


def test_an_unknown_family_is_run_as_transformers_does_with_one_message(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fresh = LocalEngine(str(model_dir("gpt2")), batch_size=None, device="cpu", dtype="float32")
    for _ in range(2):
        fresh.generate(generation_requests(2), Sampling(2))
    assert capsys.readouterr().err.count("models of type gpt2 are run by transformers' own loop") == 1
    assert not fresh.uses_prefix_cache
    assert engine("llama").uses_prefix_cache


# --- the engine itself --------------------------------------------------------------------------------------------


def test_identity_and_chat_need_no_weights() -> None:
    fresh = LocalEngine(str(model_dir()), batch_size=3, device="auto", dtype="float32")
    assert fresh.identity() == engine().identity()
    assert fresh.identity() != engine("qwen2").identity()
    assert fresh.supports_chat()
    assert "model" not in vars(fresh)
    assert fresh.batch_size == 3


@pytest.mark.parametrize(("device", "dtype"), [("gpu", "auto"), ("auto", "int4")])
def test_an_unknown_device_or_dtype_is_a_usage_error(device: str, dtype: str) -> None:
    with pytest.raises(UsageError):
        LocalEngine("any", batch_size=None, device=device, dtype=dtype)
