"""The digest of a work item changes with any part of its content."""

from helpers import sample_row

from cai_cli.data.schema import Sample, load_row
from cai_cli.runtime.work_items import item_digest


def test_a_digest_is_of_the_content_in_its_order() -> None:
    one, other = (load_row(Sample, sample_row(number)) for number in (1, 2))
    assert item_digest(one) == item_digest(load_row(Sample, sample_row(1))) < 2**32
    changed = load_row(Sample, sample_row(1, reply="another reply"))
    values = [one, other, changed, [one], [one, other], [other, one], (one, 0), (one, 1), "one", 1]
    assert len({item_digest(value) for value in values}) == len(values)
