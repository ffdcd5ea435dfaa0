"""The data of the stages that train on pairs, `cai train-pm` and `cai dpo`: read, mixed, encoded and split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from cai_cli.common import console
from cai_cli.common.errors import UsageError
from cai_cli.common.seeds import seed_for
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import Preference, conversation_id
from cai_cli.data.splits import held_out_keys, mixed
from cai_cli.models.loading import tokenizer_and_window
from cai_cli.phase2_feedback.pm_pairs import P, encode_pairs, read_preferences
from cai_cli.runtime.config import Effect, Group, Option, option, redefine
from cai_cli.runtime.counts import Counts
from cai_cli.runtime.manifest import InputFile, hash_input
from cai_cli.runtime.shared_options import DEFAULT_MODEL, MODEL_TO_TRAIN_HELP
from cai_cli.training.options import EpochOptions
from cai_cli.training.training_run import rows_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Targets(StrEnum):
    """Whether labels are probabilities or 0 and 1."""

    SOFT = "soft"
    HARD = "hard"


class PairOptions(EpochOptions):
    """Options of the trainers that make passes over pairs."""

    model: str = option(DEFAULT_MODEL, MODEL_TO_TRAIN_HELP, Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")))
    mix: str | None = option(
        None,
        "JSONL of more comparisons, such as human helpfulness labels, to mix in.",
        Option(Effect.HASHED, reads_file=True),
    )
    mix_ratio: float = option(1.0, "Pairs of --mix for each pair of INPUT.", ge=0.0)
    also: list[str] | None = option(
        None,
        "JSONL of more comparisons, such as those of an earlier round, which count as part of INPUT; repeatable.",
        Option(Effect.HASHED, metavar="FILE", reads_file=True),
    )
    soft_from: str | None = option(
        None,
        "Labels from the scores of a published set: `score` reads score_chosen and score_rejected (p_chosen is the "
        "logistic function of their difference); by default p_chosen is 1.",
        Option(metavar="NAME"),
    )
    eval_share: float = redefine(EpochOptions, "eval_share", 0.1)
    targets: Targets = option(
        Targets.SOFT,
        "Train on the probabilities of the labels (soft), as the paper does, or on 1 for the preferred reply and "
        "without ties (hard).",
    )

    def check(self) -> None:
        super().check()
        if self.soft_from and self.targets is Targets.HARD:
            raise UsageError("--soft-from excludes --targets hard", hint="give one of them", code="option-conflict")

    def main_files(self) -> dict[str, str]:
        """The files of INPUT and --also by role, which names them in manifests."""
        return {"preferences": self.input} | {f"also {number}": file for number, file in enumerate(self.also or (), 1)}

    def hash_inputs(self) -> dict[str, InputFile]:
        """The input files by role. Raises CaiError."""
        files = self.main_files() | ({"mix": self.mix} if self.mix else {})
        return {role: hash_input(file) for role, file in files.items()}


@dataclass(frozen=True)
class PreferenceData(Generic[P]):
    """The data of a run.

    Attributes:
        train: The pairs to train on.
        held_out: The pairs to evaluate on.
        tokenizer: The model's tokenizer.
        counts: What happened to the input rows.
        rows: A digest of the rows that were read, for the manifest.
    """

    train: Sequence[P]
    held_out: Sequence[P]
    tokenizer: "PreTrainedTokenizerBase"
    counts: Counts
    rows: dict[str, Any]

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max(max(len(pair.chosen), len(pair.rejected)) for pair in (*self.train, *self.held_out))


def read_pairs(
    stage: str,
    config: PairOptions,
    base: Path,
    encode: "Callable[[PreTrainedTokenizerBase, Preference], P]",
) -> PreferenceData[P]:
    """Read, mix, encode and split the pairs.

    Args:
        stage: The stage, for messages and for the random draw of `--mix`.
        config: Its options.
        base: Directory of the model.
        encode: Encodes a pair, or raises RowError.

    Raises:
        CaiError: A file cannot be read, or a line is invalid.
    """
    readers: list[RowReader] = []
    roles: dict[int, str] = {}  # id of a row -> the role of its file

    def read(role: str, file: str) -> list[Preference]:
        of_input = role == "preferences"
        readers.append(config.row_reader(of_input=of_input))
        found = read_preferences(readers[-1], file, config.limit if of_input else None, config.soft_from)
        roles.update((id(row), role) for row in found)
        return found

    main = [row for role, file in config.main_files().items() for row in read(role, file)]
    mix = read("mix", config.mix) if config.mix else []
    rows = mixed(main, mix, config.mix_ratio, seed_for(config.seed, stage, "mix"))
    counts = Counts.of_training(
        [row for reader in readers for row in reader.take_invalid()],
        reduce(add, (reader.dropped for reader in readers)),
    )
    if unused := len(main) + len(mix) - len(rows):
        counts.skipped["beyond --mix-ratio"] = unused
    if config.mix and len(mix) < round(config.mix_ratio * len(main)):
        console.say(f"{stage}: {config.mix} has {len(mix):,} pairs, fewer than --mix-ratio requests; all are used")
    tokenizer, window = tokenizer_and_window(base)
    hard = config.targets is Targets.HARD
    pairs = encode_pairs(partial(encode, tokenizer), rows, config.max_length, counts, window=window, hard=hard)
    held_out_prompts = held_out_keys(
        [conversation_id(pair.row.prompt) for pair in pairs], config.eval_share, config.seed
    )
    train = [pair for pair in pairs if conversation_id(pair.row.prompt) not in held_out_prompts]
    held_out = [pair for pair in pairs if conversation_id(pair.row.prompt) in held_out_prompts]
    counts.train, counts.held_out = len(train), len(held_out)
    counts.by_input.update(roles[id(pair.row)] for pair in pairs)
    return PreferenceData(train, held_out, tokenizer, counts, rows_digest([*main, *mix]))
