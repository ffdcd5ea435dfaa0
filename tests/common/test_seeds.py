"""Seeds depend on every part, and on where one part ends and the next begins."""

from cai_cli.common.seeds import seed_for


def test_every_part_and_its_place_decide_the_seed() -> None:
    parts = [(0, "sample", "p1", 0), (1, "sample", "p1", 0), (0, "revise", "p1", 0), (0, "sample", "p2", 0)]
    parts += [(0, "sample", "p1", 1), (0, "sample", "p1"), (0, "sample", 0, "p1"), (0, "samplep1", "", 0)]
    assert len({seed_for(*one) for one in parts}) == len(parts)


def test_seeds_are_those_that_earlier_versions_drew_with() -> None:
    assert seed_for(0, "sample", "p1", 0) == 2_478_907_167_269_750_484
    assert all(0 <= seed_for(i) < 2**63 for i in range(1000))
    assert max(seed_for(i) for i in range(1000)) > 2**62
