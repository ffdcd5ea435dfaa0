"""`cai revise`: a revision needs the principle of its critique."""

import pytest
from helpers import sample_row
from reviser_cases import Recorder, reviser

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Critique, load_row
from cai_cli.phase1_supervised.revise import revise


def test_a_critique_under_a_principle_not_in_use_stops_the_run() -> None:
    stray = load_row(Critique, {**sample_row(1), "history": [], "round": 1, "principle_id": "z", "critique": "c"})
    with pytest.raises(CaiError) as error:
        revise([stray], reviser(Recorder()))
    assert error.value.code == "unknown-principle"
    assert "'p1/0'" in error.value.message
