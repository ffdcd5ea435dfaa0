"""The usage of a server: tokens, cost, and a model that answers under another name."""

from cai_cli.engines.base import Usage


def test_cost_is_by_the_million_tokens_and_none_without_prices() -> None:
    usage = Usage("http://s", price_in=2.0, price_out=10.0)
    usage.add("m", 1_000_000, 500_000)
    assert (usage.tokens, usage.cost) == (1_500_000, 7.0)
    assert Usage("http://s").cost is None
    half = Usage("http://s", price_out=10.0, prompt_tokens=9, new_tokens=100_000)
    assert half.cost == 1.0


def test_only_the_first_answer_under_another_name_is_reported() -> None:
    usage = Usage("http://s")
    assert [usage.add(name, 1, 1) for name in ("m", "m", "n", "n", "m")] == [False, False, True, False, False]
    assert (usage.requests, usage.models) == (5, ["m", "n"])


def test_a_resumed_run_continues_from_the_recorded_usage() -> None:
    usage = Usage("http://s", price_in=1.0)
    usage.add("m", 10, 5)
    resumed = Usage("http://s", price_in=1.0)
    resumed.resume(usage.as_json())
    assert resumed == usage
    resumed.add("m", 1, 1)
    assert (usage.tokens, resumed.tokens, resumed.requests) == (15, 17, 2)
