"""The table of keys behaves like a dict and stays small."""

from hypothesis import given
from hypothesis import strategies as st

from cai_cli.common.hash_index import KeyTable


@given(st.lists(st.tuples(st.text(), st.integers(0, 2**32 - 1))))
def test_the_key_table_remembers_what_a_dict_would(pairs: list[tuple[str, int]]) -> None:
    table, known = KeyTable(), dict[str, int]()
    for key, line in pairs:
        assert table.add(key, line) == known.get(key)
        known.setdefault(key, line)
    assert table.size == len(known)
    assert all(key in table for key in known)
    assert "never added \udcff".encode("utf-8", "replace").decode() not in table


def test_the_key_table_takes_a_few_dozen_bytes_a_key() -> None:
    table = KeyTable()
    for i in range(100_000):
        assert table.add(f"row-{i}", i) is None
    assert all(table.add(f"row-{i}", 0) == i for i in range(0, 100_000, 97))
    assert "row-100000" not in table
    taken = sum(a.buffer_info()[1] * a.itemsize for a in (table.hashes, table.lines))
    assert taken <= 36 * 100_000
