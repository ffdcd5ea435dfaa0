"""Measures preference model training in pairs a second, `cai` against an unmodified RewardTrainer of TRL.

    python bench/train_pm.py [--model smollm2-135m] [--pairs 32] [--batch-size 8] [--dtype bfloat16]

Both get the same token ids, with the lengths of HH-RLHF's harmlessness pairs: about 150 tokens of shared prompt and 50
of each reply. Both train all weights for one epoch in --dtype. Prints one line per side, the largest difference of a
score between packed and plain passes, and `ratio train_pm VALUE`: pairs a second of `cai` over those of TRL.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from cai_cli.models.loading import load_reward_model, load_tokenizer
from cai_cli.models.names import resolve
from cai_cli.phase2_feedback.pm_trainer import soft_reward_trainer
from cai_cli.reward.packed_pairs import enable_packed_pairs, score_pairs
from cai_cli.reward.preference_model import score_ids
from cai_cli.training.config import TrainingConfig
from cai_cli.training.loop import without_printer
from cai_cli.training.quiet import quiet_libraries


def pairs(count: int) -> list[dict[str, Any]]:
    """Random ids, none of them a special token."""
    rng = random.Random(0)

    def ids(typical: float) -> list[int]:
        return [rng.randrange(100, 40_000) for _ in range(max(4, min(500, int(rng.lognormvariate(0, 0.7) * typical))))]

    rows = []
    for _ in range(count):
        prompt = ids(120)
        rows.append({"chosen_ids": prompt + ids(38), "rejected_ids": prompt + ids(40), "p_chosen": 1.0})
    return rows


def seconds(trainer: Any) -> float:
    with quiet_libraries():
        start = time.perf_counter()
        without_printer(trainer).train()
        return time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--pairs", type=int, default=32)
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--dtype", default="bfloat16")
    options = arguments.parse_args()

    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    path, rows = resolve(options.model), pairs(options.pairs)
    tokenizer, data = load_tokenizer(path), Dataset.from_list(rows)
    took = {}
    for side in ("trl", "cai"):
        model = load_reward_model(path, new_head_seed=0)
        training = TrainingConfig(options.batch_size, 1, 1e-5, 10_000, 0, "cpu", dtype=options.dtype)
        with tempfile.TemporaryDirectory() as folder, quiet_libraries():
            is_cai, config = side == "cai", RewardConfig(**training.arguments(Path(folder)), max_length=None)
            if is_cai:
                ids = [(row["chosen_ids"], row["rejected_ids"]) for row in rows[:4]]
                assert enable_packed_pairs(model, ids[0])
                plain = score_ids(model, tokenizer, [pair[0] for pair in ids], 4)
                gaps = [abs(a - b) for a, b in zip(score_pairs(model, ids, 4)[0], plain, strict=True)]
            trainer_class = soft_reward_trainer(share_prompts=True) if is_cai else RewardTrainer
            trainer = trainer_class(model=model, args=config, processing_class=tokenizer, train_dataset=data)
            took[side] = seconds(trainer)
        print(f"{side}: {options.pairs / took[side]:.2f} pairs/s ({options.dtype}, {options.pairs} pairs)", flush=True)
    print(f"largest difference of a score, packed against plain: {max(gaps):.1e}")
    print(f"ratio train_pm {took['trl'] / took['cai']:.2f}")


if __name__ == "__main__":
    main()
