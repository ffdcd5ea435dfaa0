"""Which options decide the output, and that they are recorded."""

from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of, options_that
from stage_cases import WORDS, prepare

from cai_cli.pipeline.registry import STAGES
from cai_cli.runtime.config import Effect
from cai_cli.runtime.stage import Phase


@pytest.mark.parametrize("stage", WORDS)
def test_every_option_that_decides_the_output_is_recorded(stage: str, cai: Cai, inputs: Path) -> None:
    # score has no script to answer for its model, red-team makes rows instead of taking them, and pairs takes two
    # files: see their tests.
    data = {name for name, s in STAGES.items() if not s.trains and s.phase is not Phase.EVALUATION}
    assert set(WORDS) == data - {"score", "red-team", "pairs"}
    cai(*prepare(stage, cai), "-o", "out.jsonl")
    recorded = set(manifest_of(inputs / "out.jsonl")["provenance"]["settings"])
    assert recorded == options_that(stage, Effect.DECIDES)
    assert {"seed", "prompt_format", "limit", "dtype"} <= recorded


# What decides the content of an output of any stage. A new option belongs here, or is declared as harmless or recorded
# by hash: this list makes sure that somebody decided.
CONTENT_OPTIONS = frozenset(
    [
        *("n", "kind", "only", "topics", "num_examples", "start_words", "similarity", "rounds", "critique", "method"),
        *("both_orders", "pairs", "principles_per_pair", "cot_samples", "clamp", "calibrate", "min_confidence"),
        *(
            "keep_adapter",
            "read_at",
            "layer",
            "principles",
            "max_principles",
            "max_new_tokens",
            "temperature",
            "top_p",
            "prompt_format",
            "seed",
            "limit",
        ),
        *(
            "shard",
            "dtype",
            "helpful_ratio",
            "revisions",
            "cut_off",
            "epochs",
            "max_steps",
            "batch_size",
            "learning_rate",
        ),
        *("max_length", "lora", "lora_rank", "eval_share", "mix_ratio", "targets", "fit_head", "algorithm", "beta"),
        *("steps", "prompts_per_step", "samples_per_prompt", "cutoff_penalty", "held_out", "monitor_every"),
        *("stop_on_goodhart", "scale_rewards", "column", "soft_from", "keep_adapter"),
        *("weights", "quantize", "optimizer", "packing", "pm_dtype", "rollouts", "system"),
        *("loss", "label_smoothing", "nll", "monitor_prompts", "judge_weight", "judge_method"),
        *("pressure_turns", "system_model", "benchmark", "rubric", "detector", "judge"),
        *("contrast", "p_chosen", "max_similarity", "skip_cut_off", "drop_system"),
    ]
)


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_only_the_listed_options_decide_the_output(stage: str) -> None:
    assert options_that(stage, Effect.DECIDES) <= CONTENT_OPTIONS
