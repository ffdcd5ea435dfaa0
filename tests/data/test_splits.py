"""Held-out rows and mixed data depend on the seed and the keys alone."""

from helpers import revision

from cai_cli.data.schema import Revision, load_row
from cai_cli.data.splits import held_out_keys, mixed
from cai_cli.phase1_supervised.sft import examples_of


def test_the_held_out_share_is_exact_and_depends_on_seed_and_key_alone() -> None:
    keys = [f"k{i}" for i in range(100)]
    held = held_out_keys(keys, 0.1, seed=0)
    assert len(held) == 10
    assert held == held_out_keys(keys[::-1] * 2, 0.1, seed=0)
    assert held != held_out_keys(keys, 0.1, seed=1)
    assert len(held_out_keys(keys[:20], 0.01, seed=0)) == 1
    assert not held_out_keys(keys[:19], 0.01, seed=0)
    assert not held_out_keys(keys, 0.0, seed=0)


def test_the_helpful_draw_depends_on_the_seed_alone_and_repeats_nothing() -> None:
    revisions = examples_of(load_row(Revision, revision(0)), "last") * 5
    helpful = [e for i in range(50) for e in examples_of(load_row(Revision, revision(i, f"h{i}")), "last")]
    drawn = [e.reply for e in mixed(revisions, helpful, 2.0, seed=1)[5:]]
    assert len(set(drawn)) == 10
    assert drawn == [e.reply for e in mixed(revisions, helpful, 2.0, seed=1)[5:]]
    assert drawn != [e.reply for e in mixed(revisions, helpful, 2.0, seed=2)[5:]]
    assert len(mixed(revisions, helpful[:3], 2.0, seed=1)) == 8
    assert len(mixed(revisions, helpful[:3], 1e308, seed=1)) == 8
