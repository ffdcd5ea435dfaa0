"""One file made of others with no model in between: `merge`, `sort`, `dedup`. Its output appears whole or not at all,
with a manifest; a run that was broken off is done again from the start."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.runtime.manifest import InputFile, run_facts
from cai_cli.runtime.output_files import finished_summary, one_writer, publish, refuse_input_as_output
from cai_cli.runtime.sinks import Counts, FileSink
from cai_cli.runtime.summary import print_summary


def rewrite(
    path: Path,
    provenance: dict[str, Any],
    inputs: Mapping[str, InputFile],
    fill: Callable[[FileSink, Counts], None],
    *,
    rows: dict[str, Any] | None = None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Let `fill` write to the sink and count `units` and `skipped`; print the summary. `rows` identifies what the
    first stage read, where it is known. Raises CaiError."""
    monitor_score_of, counts = console.Stopwatch(), Counts()
    refuse_input_as_output(path, inputs)
    with one_writer(path):
        publish(path)
        summary = finished_summary(path, provenance, overwrite)
        if summary and rows is None and any(file.is_pipe for file in inputs.values()):
            raise CaiError(f"{path} is there, and what comes through a pipe may be something else", "--overwrite")
        if summary is None:
            sink = FileSink(path, provenance, overwrite)
            sink.start_over()
            fill(sink, counts)
            facts = run_facts(monitor_score_of.seconds, inputs)
            sink.finish(counts, rows or {}, facts)
            summary = {"stage": provenance["stage"], "status": "finished", "output": str(path), **counts.as_json(),
                       "seconds": facts["seconds"]}  # fmt: skip
    print_summary(summary, as_json=as_json, stdout_is_data=False)
