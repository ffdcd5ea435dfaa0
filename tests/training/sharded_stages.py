"""Runs training stages one after another in processes that shard weights on a CPU: starting each is most of its time.

`accelerate launch --module sharded_stages FILE`: FILE is a JSON list of [stage, input, output, options]. A stage with
the option `interrupt_after` ends at that step as a kill would.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import sharded_on_cpu  # noqa: F401 - first: it lets accelerate shard weights on a CPU
from helpers import interrupted_after, stage

from cai_cli.training import distributed

if __name__ == "__main__":
    runs = json.loads(Path(sys.argv[1]).read_text())
    sys.argv[1:] = ["sft"]
    with distributed.session(frozenset({"sft"})):
        for name, source, output, options in runs:
            step = options.pop("interrupt_after", None)
            with interrupted_after(step) if step else nullcontext():
                stage(name)(source, output, device="cpu", quiet=True, **options)
    distributed.leave(0)
