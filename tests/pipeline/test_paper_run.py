"""The numbers of rows in the paper's run."""

from cai_cli.pipeline.paper_run import paper_run


def test_the_papers_run_has_its_numbers_of_rows() -> None:
    rows = {step.step: step.rows for step in paper_run()}
    assert rows["SL-CAI"] == 4 * 182_831 + 2 * 135_296
    assert rows["preference model, with human labels"] == 182_831 + 135_296
    assert rows["RL-CAI"] == 491_142 + 474_300
