"""Batches of similar length."""

from cai_cli.training.batch_order import similar_lengths


def test_every_epoch_has_every_row_once_in_a_new_order_with_similar_lengths() -> None:
    lengths = [(i * 37) % 101 for i in range(203)]
    orders = [similar_lengths(lengths, 4, seed=0, epoch=epoch, stage="sft") for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(203))] * 2
    assert orders[0] != orders[1]
    assert orders[0] == similar_lengths(lengths, 4, seed=0, epoch=0, stage="sft")
    assert orders[0] != similar_lengths(lengths, 4, seed=1, epoch=0, stage="sft")
    batches = [orders[0][i : i + 4] for i in range(0, 200, 4)]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 10  # of 60 where they are drawn at random
    means = [sum(lengths[i] for i in batch) / 4 for batch in batches]
    assert abs(sum(means[:25]) - sum(means[25:])) / 25 < 30  # of 50 where the long ones come first
