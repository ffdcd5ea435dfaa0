"""The checkpoints a killed training run goes on from: sealed when they are whole, checked before one is loaded.

The seal is a list of the sha256 of every file, written last: a checkpoint without one was being saved when the run was
killed. It tells what was lost or changed since. A stranger who writes a whole checkpoint can seal it too: against that
stands that torch reads what is pickled in it (optimizer.pt, rng_state.pth) with `weights_only`, which runs no code.
"""

import os
import shutil
from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import CaiError
from cai_cli.data.jsonl import sync_directory
from cai_cli.models.adapters import finished_model
from cai_cli.models.loading import context_window
from cai_cli.training import distributed
from cai_cli.training.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save_finished(trainer: Any, tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Write the trained model, its weights gathered from all processes where they are sharded. Called on every rank."""
    if distributed.weights_are_sharded():
        with quiet_libraries():
            trainer.save_model(str(directory))
        if distributed.leads():
            (directory / "training_args.bin").unlink(missing_ok=True)
            tokenizer.model_max_length = context_window(trainer.model.config, tokenizer)
            tokenizer.save_pretrained(directory)
    elif distributed.leads():
        save_model(finished_model(trainer), tokenizer, directory)


def save_model(model: Any, tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Write what `from_pretrained` reads: safetensors, config, tokenizer."""
    tokenizer.model_max_length = context_window(model.config, tokenizer)  # unknown is written as 1e30
    with quiet_libraries():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


SEAL = "files.sha256"  # in the form of `sha256sum -c`


def seal(checkpoint: Path) -> None:
    """Write the seal of a checkpoint whose files are all there, after they have reached the disk."""
    temporary = checkpoint / f"{SEAL}.tmp"
    lines = [f"{digest}  {name}\n" for name, digest in _digests(checkpoint, sync=True)]
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / SEAL)
    sync_directory(checkpoint)


def newest_checkpoint(work: Path) -> Path | None:
    """The newest sealed checkpoint in `work`; newer ones without a seal (killed while saving) are removed.

    Raises: CaiError when a file of it is not as it was when it was saved.
    """
    found = {
        int(p.name.rpartition("-")[2]): p for p in work.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()
    }
    for _, path in sorted(found.items(), reverse=True):
        if (path / SEAL).exists():
            verify(path)
            return path
        shutil.rmtree(path)
    return None


def verify(checkpoint: Path) -> None:
    """Raises CaiError when a file of a sealed checkpoint was changed, lost or added since it was saved."""
    sealed = (checkpoint / SEAL).read_text(encoding="utf-8", errors="replace").splitlines()
    present = [f"{digest}  {name}" for name, digest in _digests(checkpoint)]
    if changed := sorted({line.partition("  ")[2] for line in set(sealed) ^ set(present)}):
        raise CaiError(
            f"{checkpoint}: {changed[0]} is not as it was when this run saved it",
            hint=f"remove {checkpoint.name} to go on from what was saved before it, or --overwrite starts afresh",
        )


def _digests(checkpoint: Path, *, sync: bool = False) -> Iterator[tuple[str, str]]:
    """(name, sha256 in hex) of every file but the seal."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                if sync:
                    os.fsync(file.fileno())
                yield path.relative_to(checkpoint).as_posix(), file_digest(file, "sha256").hexdigest()
