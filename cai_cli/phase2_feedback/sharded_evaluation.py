"""Evaluates a preference model on held-out pairs where its weights are sharded (`cai train-pm`).

A forward pass needs every process, so all of them score all pairs together, with the model in training: when training
begins, and after its last step. Scores have the precision of training.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_cli.data.schema import JudgedPair
from cai_cli.metrics.preference_model import held_out_metrics
from cai_cli.phase2_feedback.pm_pairs import EncodedPair, score_held_out
from cai_cli.reward.packed_pairs import packing_works
from cai_cli.runtime.manifest import write_json
from cai_cli.training import distributed
from cai_cli.training.config import TrainingConfig


@dataclass
class ShardedEvaluation:
    """The evaluations of one run.

    Attributes:
        tokenizer: The model's tokenizer.
        held_out: The pairs.
        training: The options of the trainer.
        work: The directory of the run, which keeps the metrics of the start model for a resumed run.
        longest: The longest pair of the run where the model accepts packed pairs. They are no longer packed if that
            changes its scores.
        before: The metrics of the start model.
        after: The pairs with the scores of the trained model.
    """

    tokenizer: Any
    held_out: Sequence[EncodedPair]
    training: TrainingConfig
    work: Path
    longest: EncodedPair | None
    before: dict[str, Any] = field(default_factory=dict)
    after: list[JudgedPair] = field(default_factory=list)

    def callback(self, trainer: Any, put: Callable[[dict[str, Any]], None]) -> Any:
        """The callback that evaluates the start model, to add to the trainer.

        Args:
            trainer: The trainer of the preference model.
            put: Logs the metrics of the start model.
        """
        from transformers import TrainerCallback

        evaluation = self

        class StartEvaluation(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                evaluation.begin(trainer)
                if state.global_step == 0:
                    put(evaluation.before)

        return StartEvaluation()

    def begin(self, trainer: Any) -> None:
        """Find out whether pairs can be packed, and evaluate the start model."""
        with self.training.autocast():
            if self.longest and not packing_works(trainer.model, self.longest.ids):
                self.longest = None
                trainer.data_collator.packs_pairs = False
        record = self.work / "start_metrics.json"
        if trainer.state.global_step:
            self.before = distributed.from_rank_zero(lambda: json.loads(record.read_bytes()))
            return
        self.before = held_out_metrics(self._scores(trainer))
        if distributed.is_rank_zero():
            write_json(record, self.before)

    def finish(self, trainer: Any) -> None:
        """Score the pairs with the trained model."""
        self.after = self._scores(trainer)

    def _scores(self, trainer: Any) -> list[JudgedPair]:
        share = self.longest is not None
        with self.training.autocast():
            return score_held_out(
                trainer.model, self.tokenizer, self.held_out, self.training.batch_size, share_prompts=share
            )
