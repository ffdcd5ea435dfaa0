"""Outputs made from other files without a model: `merge`, `sort`, `dedup`.

Such an output is published only when it is complete, with a manifest. An interrupted run starts from scratch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.manifest import InputFile, run_facts
from cai_cli.runtime.output_files import finished_summary, is_stdout, one_writer, publish, refuse_input_as_output
from cai_cli.runtime.sinks import FileSink, Sink, stream_sink
from cai_cli.runtime.summary import print_summary, refuse_all_rejected

Fill = Callable[[Sink, Counts], None]


def rewrite(
    path: Path,
    provenance: dict[str, Any],
    inputs: Mapping[str, InputFile],
    fill: Fill,
    *,
    rows: dict[str, Any] | None = None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Create the output unless it is finished, and print the summary.

    Args:
        path: The output, a file or a stream.
        provenance: What decides its content.
        inputs: The input files by role.
        fill: Writes the lines to the sink and counts `items` and `skipped`.
        rows: Identifies the rows that the first stage read, where it is known.
        overwrite: Whether to start from scratch where the output exists.
        as_json: Whether the summary is one JSON object.

    Raises:
        CaiError: The output belongs to another run, or all its rows are rejected.
    """
    stopwatch = console.Stopwatch()

    def make(sink: Sink) -> dict[str, Any]:
        counts = Counts()
        fill(sink, counts)
        facts = run_facts(stopwatch.seconds, inputs)
        sink.finish(counts, rows or {}, facts)
        return {"stage": provenance["stage"], "status": "finished", "output": str(path), **counts.as_json(),
                **counts.ends_as_json(), "seconds": facts["seconds"]}  # fmt: skip

    if stream := stream_sink(str(path)):
        summary = make(stream)
    else:
        refuse_input_as_output(path, inputs)
        with one_writer(path):
            publish(path)
            done = finished_summary(path, provenance, overwrite)
            if done and rows is None and any(file.is_pipe for file in inputs.values()):
                raise CaiError(
                    f"{path} exists, and the input is a pipe, whose content may have changed",
                    hint="--overwrite",
                    code="output-exists",
                )
            summary = done or make(_new_file(path, provenance, overwrite))
    print_summary(summary, as_json=as_json, stdout_is_data=is_stdout(str(path)))
    refuse_all_rejected(summary)


def _new_file(path: Path, provenance: dict[str, Any], overwrite: bool) -> FileSink:
    sink = FileSink(path, provenance, overwrite)
    sink.start_over()
    return sink
