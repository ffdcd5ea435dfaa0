"""metrics.jsonl after a torn line and a repeated step."""

from pathlib import Path

from helpers import rows_in

from cai_cli.training.metrics_log import Metrics


def test_metrics_are_complete_after_a_torn_line_and_a_repeated_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, ["loss", "held_out_loss"])
    for step in (0, 1, 2, 3):
        metrics.put(step, {"loss": step / 2})
    with path.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    metrics = Metrics(path, ["loss", "held_out_loss"])
    metrics.cut_after(1)
    metrics.put(2, {"loss": 7.0})
    metrics.put(2, {"held_out_loss": 8.0})
    assert [(r["step"], r["loss"]) for r in rows_in(path)] == [(0, 0.0), (1, 0.5), (2, 7.0)]
    assert rows_in(path)[-1] == {"step": 2, "loss": 7.0, "held_out_loss": 8.0}
