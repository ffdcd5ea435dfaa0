"""Every id belongs to exactly one shard."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.errors import UsageError
from cai_cli.data.sharding import Shard


@given(st.text(), st.integers(1, 40))
def test_every_id_is_in_exactly_one_shard(prompt_id: str, count: int) -> None:
    assert [Shard(i, count).contains(prompt_id) for i in range(1, count + 1)].count(True) == 1


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "a/b", "1/4/2", "1.5/4"])
def test_an_invalid_shard_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as error:
        Shard.parse(text)
    assert error.value.code == "invalid-option"
