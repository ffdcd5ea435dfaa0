"""`cai sft --packing`: several examples in one row of a batch, through TRL's packing without padding.

The attention must keep the examples of a row apart. Flash attention does it by the lengths of the examples, the other
implementations of transformers by their positions; a model with layers of another kind may not. So the model is tried
before it is trained.
"""

from collections.abc import Sequence
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.training.config import TrainingConfig

LONGEST = 128  # tokens of each of the two examples that a model is tried with


def pack(rows: Sequence[dict[str, list[int]]], length: int) -> Any:
    """A dataset of rows that hold as many examples as `length` tokens take; no example is cut.

    Args:
        rows: The examples: `input_ids` and `labels`, none longer than `length`.
        length: The most tokens in a row.
    """
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl import pack_dataset

    disable_progress_bar()
    return pack_dataset(Dataset.from_list(list(rows)), length, "bfd")


def keeps_examples_apart(model: Any, rows: Sequence[dict[str, list[int]]], training: TrainingConfig) -> bool:
    """Whether the model gives the second of two packed examples the log-probabilities that it has alone.

    Args:
        model: The model to train; it is left in evaluation mode.
        rows: Two examples.
        training: The options of the trainer.
    """
    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    cut = [{name: ids[:LONGEST] for name, ids in row.items()} for row in rows]
    inputs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(cut)
    inputs = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in inputs.items()}
    inputs.pop("labels")
    second = torch.tensor([cut[1]["input_ids"]], device=model.device)
    model.eval()
    with torch.inference_mode(), training.autocast():
        packed = model(**inputs, use_cache=False).logits[:, -second.shape[1] :]
        alone = model(input_ids=second, use_cache=False).logits
    rounding = 1e-3 if packed.dtype == torch.float32 else 0.25
    difference = packed.float().log_softmax(-1) - alone.float().log_softmax(-1)
    return bool(difference.abs().max() < rounding)


def check_packing(model: Any, rows: Sequence[dict[str, list[int]]], training: TrainingConfig) -> None:
    """Raises UsageError (`option-conflict`) where the examples of a row would attend to each other."""
    if len(rows) > 1 and not keeps_examples_apart(model, rows[:2], training):
        raise UsageError(
            f"--packing: with the attention {model.config._attn_implementation!r} of this {model.config.model_type} "
            "model, examples in one row would attend to each other",
            hint="leave --packing out, or try --attention flash_attention_2",
            code="option-conflict",
        )


def with_padded_evaluation(trainer_class: Any) -> Any:
    """A subclass of the trainer that packs the rows to train on, but not those to evaluate on.

    Evaluation counts the tokens of each row (`sft`), and leaves out rows that only fill up the last batch.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class WithPaddedEvaluation(trainer_class):  # type: ignore[misc]
        def get_eval_dataloader(self, *arguments: Any, **options: Any) -> Any:
            packing = self.data_collator
            self.data_collator = DataCollatorForLanguageModeling(pad_token_id=packing.pad_token_id)
            try:
                return super().get_eval_dataloader(*arguments, **options)
            finally:
                self.data_collator = packing

    return WithPaddedEvaluation
