"""The checkpoints from which a killed training run resumes: sealed when complete, verified before loading.

The seal lists the sha256 of every file and is written last, so a checkpoint without a seal was being saved when the run
was killed. It reveals files that were lost or changed since. It does not protect against somebody who writes a whole
checkpoint with its seal; against that, torch reads the pickled files (optimizer.pt, rng_state.pth) with `weights_only`,
which runs no code.
"""

import os
import shutil
from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_atomically
from cai_cli.data.jsonl import sync_directory
from cai_cli.engines.tokenization import declare_end_of_turn
from cai_cli.models.adapters import finished_model, is_adapted, merged_copy, save_adapter, without_adapter_wrapper
from cai_cli.models.chat_template import given_template
from cai_cli.models.loading import context_window
from cai_cli.training import distributed
from cai_cli.training.quiet import quiet_libraries
from cai_cli.training.sharding import gathered_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "adapter"  # the folder of a finished model that `--keep-adapter` writes


def save_finished(
    trainer: Any, tokenizer: "PreTrainedTokenizerBase", directory: Path, *, keep_adapter: bool = False
) -> None:
    """Write the trained model, gathering weights that are sharded. Called on every rank.

    Args:
        trainer: The trainer.
        tokenizer: The model's tokenizer.
        directory: Where the files are written.
        keep_adapter: Whether to write the adapter of LoRA too, to `adapter/` there.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not distributed.weights_are_sharded():
        if distributed.is_rank_zero():
            if keep_adapter:
                save_adapter(model, directory / ADAPTER)
                save_given_template(model.get_base_model(), tokenizer, directory / ADAPTER)
            with quiet_libraries():  # adapters are merged here
                finished = finished_model(trainer)
            save_model(finished, tokenizer, directory)
        return
    weights = gathered_weights(trainer)
    if distributed.is_rank_zero():
        if keep_adapter:
            save_adapter(model, directory / ADAPTER, weights)
            save_given_template(model.get_base_model(), tokenizer, directory / ADAPTER)
        if is_adapted(model):
            with quiet_libraries():
                model = merged_copy(model, weights)
            save_model(model, tokenizer, directory)
        else:
            save_model(model, tokenizer, directory, weights)


def save_start_model(
    base: Path, tokenizer: "PreTrainedTokenizerBase", directory: Path, *, keep_adapter: bool = False
) -> None:
    """Write the start model as the finished one, where no step was better. It has no adapter to keep. Called on every
    rank."""
    from cai_cli.models.loading import load_causal_lm

    if distributed.is_rank_zero():
        if keep_adapter:
            console.warn(f"--keep-adapter: no {ADAPTER}/ is written, because the start model is kept")
        save_model(load_causal_lm(base), tokenizer, directory)


def save_given_template(base: Any, tokenizer: "PreTrainedTokenizerBase", directory: Path) -> None:
    """Write the tokenizer beside an adapter where its chat template is not that of the base model (`--chat-template`),
    so that BASE+ADAPTER renders chats as in training."""
    if given_template(Path(base.config._name_or_path)) is not None:
        with quiet_libraries():
            tokenizer.save_pretrained(directory)


def save_model(
    model: Any, tokenizer: "PreTrainedTokenizerBase", directory: Path, weights: dict[str, Any] | None = None
) -> None:
    """Write the files that `from_pretrained` reads: safetensors, config, tokenizer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        directory: Where the files are written.
        weights: The weights of the model by name, where it holds a part of them only.
    """
    tokenizer.model_max_length = context_window(model.config, tokenizer)  # an unknown length is written as 1e30
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):  # TRL turns it on for training; with a cache it is an error
        text.output_router_logits = False
    if model.can_generate():  # a preference model cannot
        declare_end_of_turn(model, tokenizer)
        _allow_sampling(model.generation_config)
    with quiet_libraries():
        model.save_pretrained(directory, state_dict=weights)
        tokenizer.save_pretrained(directory)


def _allow_sampling(config: Any) -> None:
    """Turn `do_sample` on in a generation config that sets a temperature or the like, which transformers refuses to
    save otherwise. Many published models have such a config."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def try_saving(trainer: Any) -> None:
    """Write everything of the finished model except its weights, and remove it; check that the weights will fit.

    Called before the first step, because a model that cannot be written after the last one has cost hours.

    Args:
        trainer: A trainer whose `processing_class` is the tokenizer. Called on every rank.

    Raises:
        CaiError: The model's config, generation config or tokenizer cannot be written (`invalid-model`), or the disk
            has less space than its weights need (`cannot-write`).
    """
    distributed.from_rank_zero(lambda: _try_saving(trainer))


def _try_saving(trainer: Any) -> None:
    model = without_adapter_wrapper(trainer.accelerator.unwrap_model(trainer.model))
    work = Path(trainer.args.output_dir)
    try:
        with TemporaryDirectory(prefix="try-saving-", dir=work) as folder:
            save_model(model, trainer.processing_class, Path(folder), weights={})
    except OSError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise CaiError(
            f"the model could not be saved after training: {' '.join(str(error).split())}",
            hint="fix its config, generation_config or chat template; nothing was trained",
            code="invalid-model",
        ) from error
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(work).free
    if free < needed:
        raise CaiError(
            f"cannot write {work}: the finished model needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free",
            hint="free disk space or choose another -o; nothing was trained",
            code="cannot-write",
        )


SEAL = "files.sha256"  # in the form of `sha256sum -c`


def seal(checkpoint: Path) -> None:
    """Sync the files of a complete checkpoint to disk, then write its seal."""
    lines = [f"{digest}  {name}\n".encode() for name, digest in _digests(checkpoint, sync=True)]
    write_atomically(checkpoint / SEAL, lines)
    sync_directory(checkpoint)


def newest_checkpoint(work: Path) -> Path | None:
    """The newest sealed checkpoint in `work`, or None. Newer ones without a seal are removed.

    Raises:
        CaiError: `invalid-checkpoint`, when a file of it has changed since it was saved.
    """
    by_step = {
        int(p.name.rpartition("-")[2]): p for p in work.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()
    }
    for _, path in sorted(by_step.items(), reverse=True):
        if (path / SEAL).exists():
            verify(path)
            return path
        shutil.rmtree(path)
    return None


def verify(checkpoint: Path) -> None:
    """Raises CaiError `invalid-checkpoint` when a file of a sealed checkpoint was changed, lost or added since."""
    sealed = (checkpoint / SEAL).read_text(encoding="utf-8", errors="replace").splitlines()
    present = [f"{digest}  {name}" for name, digest in _digests(checkpoint)]
    if changed := sorted({line.partition("  ")[2] for line in set(sealed) ^ set(present)}):
        raise CaiError(
            f"{checkpoint}: {changed[0]} has changed since this run saved it",
            hint=f"remove {checkpoint.name} to resume from the one before it, or --overwrite starts from scratch",
            code="invalid-checkpoint",
        )


def _digests(checkpoint: Path, *, sync: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (name, sha256 in hex) of every file except the seal."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with path.open("rb") as file:
                if sync:
                    os.fsync(file.fileno())
                yield path.relative_to(checkpoint).as_posix(), file_digest(file, "sha256").hexdigest()
