"""The prompts of `cai rl` (paper section 4.2): which fit, which are held out for the checks, and their order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError
from cai_cli.common.seeds import seed_for
from cai_cli.data.schema import Prompt, conversation_id, reject
from cai_cli.data.splits import mixed, pick_keys
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.loading import reading_of, tokenizer_and_window
from cai_cli.phase2_feedback.rl_config import RlConfig
from cai_cli.prompting.base import assistant
from cai_cli.reward.preference_model import encode_conversation
from cai_cli.runtime.counts import Counts
from cai_cli.training.training_run import rows_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_order(count: int, steps: int, per_step: int, seed: int) -> list[int]:
    """Return the indices of the prompts of all steps, in passes over all prompts, each in a new random order."""
    rng = random.Random(seed_for(seed, "rl", "order"))  # noqa: S311
    order: list[int] = []
    while len(order) < steps * per_step:
        order += rng.sample(range(count), count)
    return order[: steps * per_step]


def fitting_prompts(
    prompts: Sequence[Prompt], policy: Path, preference_models: Sequence[Path], max_new_tokens: int, counts: Counts
) -> list[Prompt]:
    """Return the distinct prompts that fit every model together with a reply of `max_new_tokens`.

    Args:
        prompts: The prompts.
        policy: Path of the policy.
        preference_models: Paths of the preference models.
        max_new_tokens: Longest reply, in tokens.
        counts: Receives the prompts that do not fit (rejected) and the repeated ones (skipped).
    """
    fitting, known = [], set()
    tokenizer, window = tokenizer_and_window(policy)
    scorers = [(*tokenizer_and_window(path), reading_of(path)) for path in preference_models]
    for prompt in prompts:
        try:
            room = window - len(encode_chat(tokenizer, prompt.prompt, add_generation_prompt=True))
            for scorer_tokenizer, scorer_window, reading in scorers:
                encoded = encode_conversation(scorer_tokenizer, [*prompt.prompt, assistant("")], reading)
                room = min(room, scorer_window - len(encoded))
        except RowError as error:
            counts.reject(reject(prompt.key, error.message, prompt))
            continue
        same = conversation_id(prompt.prompt)
        if room < max_new_tokens:
            reason = "prompt and --max-new-tokens do not fit the context window"
            counts.reject(reject(prompt.key, reason, prompt))
        elif same in known:
            counts.skipped["same prompt as an earlier line"] += 1
        else:
            known.add(same)
            fitting.append(prompt)
    return fitting


def longest_prompt(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the most tokens of a prompt, as the policy reads it."""
    return max(len(encode_chat(tokenizer, prompt.prompt, add_generation_prompt=True)) for prompt in prompts)


def hold_out(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return (training prompts, held-out prompts), chosen by a hash of seed and prompt.

    Args:
        prompts: Distinct prompts.
        count: Number to hold out; at most half of the prompts are.
        seed: Random seed.

    Raises:
        CaiError: There is only one prompt.
    """
    if len(prompts) == 1:
        raise CaiError("rl: one prompt is too few, because some are held out to check the policy", code="too-few-rows")
    if count > len(prompts) // 2:
        count = len(prompts) // 2
        held_out = "1 prompt is" if count == 1 else f"{count:,} prompts are"
        console.say(f"rl: {held_out} held out, half of all prompts, which is fewer than --held-out")
    keys = [conversation_id(prompt.prompt) for prompt in prompts]
    held = pick_keys(keys, count, seed)
    train = [prompt for prompt, key in zip(prompts, keys, strict=True) if key not in held]
    return train, [prompt for prompt, key in zip(prompts, keys, strict=True) if key in held]


@dataclass(frozen=True)
class RlPrompts:
    """The prompts of a run.

    Attributes:
        train: The prompts to train on.
        held_out: The prompts to check the policy on.
        counts: What happened to the input rows.
        rows: A digest of the rows that were read, for the manifest.
    """

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    counts: Counts
    rows: dict[str, Any]


def read_rl_prompts(config: RlConfig, base: Path, preference_models: Sequence[Path]) -> RlPrompts:
    """Read, mix and split the prompts. A prompt that does not fit a model is rejected.

    Args:
        config: The options of the stage.
        base: Directory of the policy.
        preference_models: Directories of the preference models, whose context windows limit the prompts too.

    Raises:
        CaiError: A file cannot be read, or too few prompts fit.
    """
    rubrics = config.judge is not None
    reader, helpful_reader = config.row_reader(), config.row_reader(of_input=False)
    prompts = [prompt for _, prompt in reader.prompts(config.input, limit=config.limit, rubrics=rubrics)]
    helpful: list[Prompt] = []
    if config.helpful:
        helpful += [prompt for _, prompt in helpful_reader.prompts(config.helpful, "helpful", rubrics=rubrics)]
    counts = Counts.of_training(
        [*reader.take_invalid(), *helpful_reader.take_invalid()], reader.dropped + helpful_reader.dropped
    )
    chosen = mixed(prompts, helpful, config.helpful_ratio, seed_for(config.seed, "rl", "helpful"))
    if unused := len(prompts) + len(helpful) - len(chosen):
        counts.skipped["beyond --helpful-ratio"] = unused
    if config.helpful and len(helpful) < round(config.helpful_ratio * len(prompts)):
        console.say(
            f"rl: {config.helpful} has {len(helpful):,} prompts, fewer than --helpful-ratio requests; all are used"
        )
    fitting = fitting_prompts(chosen, base, preference_models, config.max_new_tokens, counts)
    train, held_out = hold_out(fitting, config.held_out, config.seed)
    counts.train, counts.held_out = len(train), len(held_out)
    return RlPrompts(train, held_out, counts, rows_digest([*prompts, *helpful]))
