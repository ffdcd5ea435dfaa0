"""Merges the LoRA adapter of a directory into its base model.

An adapter is always given together with its base model: the model that its file names is never loaded.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.models.fetch import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PICKLED,
    adapter_base,
    cache_dir,
    check_model_dir,
    loading,
    published_name,
)
from cai_cli.models.fingerprint import FINGERPRINTED, files_digest, fingerprint, weights_digest
from cai_cli.models.license import stated_license
from cai_cli.models.loading import is_classifier, load_causal_lm, load_reward_model, load_tokenizer
from cai_cli.models.reading import RECORD, recorded_base

HEADS = ("score", "classifier")
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, *(name for name in FINGERPRINTED if "safetensors" not in name))
NOTICES = ("LICENSE*", "NOTICE*")


def merged_model(base: Path, adapter: Path) -> Path:
    """The directory of a model with an adapter merged into its weights, which is made once and cached.

    Raises:
        CaiError: As `merge`, or the cache cannot be written (`cannot-write`).
    """
    from filelock import FileLock

    check_adapter_dir(adapter)
    _check_base(base, adapter)  # also where the merged model is in the cache
    content = sha256(f"{fingerprint(base)}\n{files_digest(adapter, ADAPTER_FILES)}\n".encode()).hexdigest()
    final = cache_dir() / "merged" / content[:32]
    with _writing(final.parent, hint="set CAI_CACHE to a directory with space"):
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f"{final.name}.lock")):
            if not final.is_dir():
                console.say(f"merging {adapter} into {base}: kept in {final}")
                _merge(base, adapter, final)
    return final


def merge(base: Path, adapter: Path, output: Path) -> None:
    """Write a model with an adapter merged into its weights, in float32, to a directory that does not exist yet.

    The tokenizer and its chat template are the adapter's if it has them, else the base model's.

    Raises:
        CaiError: The directory is not that of an adapter, the adapter does not fit the model (`invalid-model`), or it
            is that of a preference model and its head is missing (`wrong-model-kind`), or the output cannot be written
            (`cannot-write`).
    """
    check_adapter_dir(adapter)
    _check_base(base, adapter)
    _merge(base, adapter, output)


def _merge(base: Path, adapter: Path, output: Path) -> None:
    work = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    with _writing(output):
        work.mkdir(parents=True)
    try:
        _write_merged(base, adapter, work)
        with _writing(output):
            work.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _writing(output: Path, hint: str | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CaiError(f"{output}: cannot be written: {error.strerror or error}", hint, code="cannot-write") from error


def _write_merged(base: Path, adapter: Path, work: Path) -> None:
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else base)
    with warnings.catch_warnings(action="ignore"):
        model = _adapted(base, adapter)
    with loading(base), _writing(work):
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    for file in [file for pattern in NOTICES for file in base.glob(pattern)]:
        shutil.copyfile(file, work / file.name)
    if (adapter / RECORD).is_file():
        shutil.copyfile(adapter / RECORD, work / RECORD)
    source = {"base": fingerprint(base), "adapter": files_digest(adapter, ADAPTER_FILES)}
    source |= {"license": stated} if (stated := stated_license(base)) else {}
    (work / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
    check_model_dir(work)


def check_adapter_dir(path: Path) -> None:
    """Check that `path` is the directory of an adapter.

    Raises:
        CaiError: It is not (`invalid-model`), or its only weights are pickled (`unsafe-model`).
    """
    if not (path / ADAPTER_CONFIG).is_file():
        raise CaiError(f"{path}: not an adapter ({ADAPTER_CONFIG} is missing)", code="invalid-model")
    if (path / ADAPTER_WEIGHTS).is_file():
        return
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(f"adapter_{pattern}"))
    if pickled:
        raise CaiError(
            f"{path}: only pickled weights ({pickled[0]}), which can run code when they are loaded",
            hint="save the adapter again with `save_pretrained`, which writes safetensors",
            code="unsafe-model",
        )
    raise CaiError(f"{path}: no weights ({ADAPTER_WEIGHTS} is missing)", code="invalid-model")


def _check_base(base: Path, adapter: Path) -> None:
    """Warn where the adapter's file names a model of another name, which shapes alone cannot tell.

    A head alone reads nothing in the hidden states of other weights, so it is refused there. A copy of the same name,
    such as one in another precision, gets a warning only.

    Raises:
        CaiError: The adapter is the head of another model (`invalid-model`).
    """
    recorded = adapter_base(adapter)
    is_other = bool(recorded) and Path(str(recorded)).name != Path(published_name(base)).name
    fitted_to = recorded_base(adapter)
    if fitted_to and fitted_to != weights_digest(base):
        if is_other or not recorded:
            raise CaiError(
                f"{adapter}: a head that was fitted to the weights of {recorded or 'another model'}, not of {base}",
                hint="`cai train-pm --fit-head --epochs 0 --keep-adapter` fits one to this model",
                code="invalid-model",
            )
        console.warn(f"{adapter}: was fitted to another copy of {recorded}; its scores may differ from those published")
    elif is_other:
        console.warn(f"{adapter}: its {ADAPTER_CONFIG} says that it was trained on {recorded!r}, not on {base}")


def _adapted(base: Path, adapter: Path) -> Any:
    """The model with the adapter merged into its weights."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    with loading(adapter):
        config: Any = PeftConfig.from_pretrained(str(adapter))
        weights = load_file(adapter / ADAPTER_WEIGHTS)
    if config.is_prompt_learning or getattr(config, "megatron_config", None):
        raise CaiError(f"{adapter}: a {config.peft_type} adapter, which cannot be merged", code="invalid-model")
    has_head = any(module_of(name) in HEADS for name in weights)
    _check_head(adapter, config, has_head)
    model = _base_model(base, has_head)
    rows = next((len(value) for name, value in weights.items() if module_of(name) == "embed_tokens"), None)
    if rows is not None and rows != model.get_input_embeddings().num_embeddings:  # trained with further tokens
        model.resize_token_embeddings(rows, mean_resizing=False)
    config.inference_mode, config.base_model_name_or_path = True, None
    try:
        wrapped = get_peft_model(model, config)
        left = set_peft_model_state_dict(wrapped, weights)
        missing = [name for name in left.missing_keys if "lora_" in name or "modules_to_save" in name]
        if alone := [*left.unexpected_keys, *missing]:
            raise ValueError(f"{alone[0]} is in one of the two only")
        return wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # PEFT and torch share no base class
        reason = " ".join(str(error).split())
        raise CaiError(
            f"{adapter}: does not fit {base}: {reason[:300]}",
            hint="use the base model that the adapter was trained on",
            code="invalid-model",
        ) from error


def module_of(name: str) -> str:
    """The name of the module that a weight belongs to: "score" for "base_model.model.score.weight"."""
    return name.rpartition(".")[0].rpartition(".")[2]


def _check_head(adapter: Path, config: Any, has_head: bool) -> None:
    trained = config.task_type == "SEQ_CLS" or set(HEADS) & set(getattr(config, "modules_to_save", None) or ())
    if trained and not has_head:
        raise CaiError(
            f"{adapter}: the adapter of a preference model without its head, so that its scores would be random",
            hint="save the adapter with its head (PEFT's `modules_to_save`)",
            code="wrong-model-kind",
        )


def _base_model(base: Path, has_head: bool) -> Any:
    """The base model in float32: most changes of a short training are smaller than the rounding of bfloat16."""
    if has_head:
        return load_reward_model(base, new_head_seed=0)
    return load_reward_model(base) if is_classifier(base) else load_causal_lm(base)
