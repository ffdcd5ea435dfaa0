"""Runs one trainer from its newest checkpoint to its last step."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_error
from cai_cli.common.library_errors import cannot_write
from cai_cli.common.seeds import seed_for
from cai_cli.training import distributed, trackers
from cai_cli.training.checkpoints import newest_checkpoint, seal, try_saving
from cai_cli.training.metrics_log import Metrics


def fit(trainer: Any, metrics: Metrics, columns: Mapping[str, str], *, name: str) -> dict[str, float | None]:
    """Train to the last step, resuming from the newest complete checkpoint in the trainer's output directory.

    Args:
        trainer: A trainer of transformers or TRL.
        metrics: Receives a row per step.
        columns: Name in metrics.jsonl -> name in the trainer's log.
        name: The stage, for messages.

    Returns:
        `tokens` and `seconds` of this run, of all processes together, and `tokens_per_second`.

    Raises:
        CaiError: The checkpoint has changed since it was saved or holds pickled objects (`invalid-checkpoint`), the
            loss is not finite (`not-finite`), the disk is full (`cannot-write`), or as `try_saving`.
    """
    try_saving(trainer)
    checkpoint = distributed.from_rank_zero(lambda: newest_checkpoint(Path(trainer.args.output_dir)))
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    metrics.cut_after(done)
    if checkpoint:
        console.say(f"{name}: resuming after step {done:,}")
    try:
        with ExitStack() as stack:
            steps = _steps_callback(metrics, columns, name, stack)
            trainer.add_callback(steps)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trackers.finish(trainer.args.report_to)
    except UnpicklingError as error:  # raised by torch for anything but numbers
        raise CaiError(
            f"{checkpoint} cannot be loaded: it holds pickled objects, which could run code",
            hint="--overwrite starts from scratch",
            code="invalid-checkpoint",
        ) from error
    except OSError as error:
        if not cannot_write(error, Path(trainer.args.output_dir)):
            raise  # of a tracker, say
        hint = "earlier checkpoints are kept; run the same command again to resume"
        raise write_error(trainer.args.output_dir, error, hint) from error
    rate = steps.tokens / steps.seconds if steps.tokens and steps.seconds else None
    return {"tokens": int(steps.tokens), "seconds": steps.seconds, "tokens_per_second": rate and round(rate, 1)}


def without_printer(trainer: Any) -> Any:
    """The trainer without its callback that prints every log row to stdout."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _steps_callback(metrics: Metrics, columns: Mapping[str, str], name: str, stack: ExitStack) -> Any:
    from accelerate import PartialState
    from transformers import TrainerCallback, set_seed

    class Steps(TrainerCallback):  # type: ignore[misc]
        advance: Callable[[float], None]
        stopwatch: console.Stopwatch
        tokens = seconds = 0.0
        before = 0.0  # tokens that earlier runs processed

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stopwatch, self.before = console.Stopwatch(), state.num_input_tokens_seen
            self.advance = stack.enter_context(console.track(state.max_steps, name, "steps"))
            self.advance(state.global_step)

        def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
            # The sampler of a process that resumes within an epoch would not learn its number: accelerate does not
            # pass it on through both the batches that it skips and those that it gives to other processes.
            train_dataloader.set_epoch(int(state.epoch))

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # A checkpoint restores torch's generators but not those of every library, nor across worker counts.
            set_seed((seed_for(args.seed, "step", state.global_step) + args.process_index) % 2**32)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = round(self.stopwatch.seconds, 2)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.advance(1)
            if state.global_step >= state.max_steps:
                control.should_save = False  # the finished model is saved next; a checkpoint would be another copy

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            PartialState().wait_for_everyone()  # every process writes its own file into the checkpoint
            if state.is_world_process_zero:
                seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" not in logs:
                return
            if not math.isfinite(logs["loss"]):
                raise CaiError(
                    f"the loss is {logs['loss']} at step {state.global_step}",
                    hint="a lower --learning-rate may help",
                    code="not-finite",
                )
            metrics.put(state.global_step, {name: logs.get(logged_name) for name, logged_name in columns.items()})
            # SFT and RewardTrainer count from 0 in every run, RLOO and GRPO from the count of the checkpoint.
            self.tokens = max(self.tokens, logs.get("num_tokens", 0.0) - self.before)

    return Steps()
