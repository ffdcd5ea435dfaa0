"""`cai agreement` prints and writes the metrics of labels."""

import json
from pathlib import Path

import orjson
from conftest import Cai
from helpers import write_rows
from label_rows import flipped, steady

from cai_cli.data.schema import dump_row, reject
from cai_cli.metrics.label_audit import audit


def test_the_command_prints_every_metric_and_writes_it_once(cai: Cai, tmp_path: Path) -> None:
    rows = [steady(i, "chosen" if i % 3 else "rejected") for i in range(30)]
    write_rows(tmp_path / "prefs.jsonl", (orjson.loads(dump_row(row)) for row in rows))
    tie = reject("p99", "tie", flipped(99))
    write_rows(tmp_path / "prefs.jsonl.rejected.jsonl", [orjson.loads(dump_row(tie))])
    done = cai("eval", "agreement", "prefs.jsonl", "--json", "-o", "audit.json")
    assert (done.code, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "audit.json").read_text()) == audit(rows, [tie])
    assert set(found["agreement"]) == {"value", "low", "high", "n"}
    assert cai("eval", "agreement", "prefs.jsonl", "-o", "audit.json").code == 1
    table = cai("eval", "agreement", "prefs.jsonl", "-o", "audit.json", "--overwrite").stdout
    assert table.startswith("trusted: ")
    for name in ("agreement", "flip rate", "right at 0.8 to 0.9", "kind: mean p first", "1 ties"):
        assert name in table
    assert "the intervals of a metric over principles are simultaneous" not in table  # there is one principle
    expected = found["calibration_error_if_calibrated"]
    assert f"for a calibrated judge of the same pairs {expected:.3f} on average" in table
    piped = cai("eval", "agreement", "-", "--json", stdin=(tmp_path / "prefs.jsonl").read_bytes())
    assert json.loads(piped.stdout)["ties"] == 0


def test_an_invalid_row_is_named_with_file_and_line(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "prefs.jsonl", [orjson.loads(dump_row(steady(1))), {"id": "x"}])
    done = cai("eval", "agreement", "prefs.jsonl")
    assert (done.code, done.error) == (1, "invalid-row")
    assert "prefs.jsonl:2: " in done.stderr
