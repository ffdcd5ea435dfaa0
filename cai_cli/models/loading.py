"""Model names: what directory is meant, what exactly is in it, and how it is loaded without running its code.

A name is a local directory, an alias (`ALIASES`) or a Hub name `org/name`. Every stage records the fingerprint
of the directory it used, so that a row can be traced to the bytes of the model that made it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.models.fetch import ALIASES, check_model_dir, loading
from cai_cli.models.fingerprint import fingerprint
from cai_cli.models.names import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ALIASES", "fingerprint", "load_causal_lm", "load_reward_model", "load_tokenizer", "resolve"]
DTYPES = ("float32", "bfloat16", "float16")


# --- loading ------------------------------------------------------------------------------------------------


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in `path`, padding on the left (as generation needs it).

    Where a model has no padding token its end-of-sequence token serves: mask by `attention_mask`, not by id.
    Raises: CaiError when there is none, when it needs its own code, or when it has neither token.
    """
    from transformers import AutoTokenizer

    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615
            path, trust_remote_code=False, local_files_only=True, padding_side="left"
        )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise CaiError(f"{path}: the tokenizer has neither a padding nor an end-of-sequence token")
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: Path, dtype: str = "float32", device: str = "cpu") -> "PreTrainedModel":
    """The language model in `path`, in evaluation mode, on `device` (as torch spells it), weights as `dtype`.

    Raises: CaiError when the directory is not that of a whole language model, the model needs its own code, or
    the device is missing or too small.
    """
    from transformers import AutoModelForCausalLM

    check_model_dir(path)
    if _is_classifier(path):
        raise CaiError(f"{path}: a preference model, not a language model")
    model, missing = _load(AutoModelForCausalLM, path, dtype, device)
    if missing:
        raise CaiError(f"{path}: weights are missing: {', '.join(sorted(missing)[:3])}")
    return model


def load_reward_model(
    path: Path, dtype: str = "float32", device: str = "cpu", new_head_seed: int | None = None
) -> "PreTrainedModel":
    """A preference model: a sequence classifier with one output, in evaluation mode.

    With `new_head_seed` the scalar head may be absent from `path` (a language model to start training from) and
    is drawn from that seed; without, its absence is an error: a random head would give random rewards in
    silence. The padding token is the tokenizer's, as the score is read at the last token that is not padding.

    Raises: CaiError as `load_causal_lm`.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    check_model_dir(path)
    tokenizer = load_tokenizer(path)
    with torch.random.fork_rng(devices=[], enabled=new_head_seed is not None):
        if new_head_seed is not None:
            torch.manual_seed(new_head_seed)
        model, missing = _load(AutoModelForSequenceClassification, path, dtype, device, num_labels=1)
    head = {name for name in missing if name.split(".")[0] in ("score", "classifier")}
    if missing - head or (head and new_head_seed is None):
        raise CaiError(
            f"{path}: no preference model (weights are missing: {', '.join(sorted(missing)[:3])})",
            hint="`cai train-pm` makes one from a language model",
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _is_classifier(path: Path) -> bool:
    try:
        config = json.loads((path / "config.json").read_bytes())
        return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
    except (ValueError, AttributeError) as error:
        raise CaiError(f"{path / 'config.json'}: not a model's config: {error}") from error


def _load(auto: Any, path: Path, dtype: str, device: str, **options: object) -> tuple["PreTrainedModel", set[str]]:
    """The model and the names of the parameters that `path` does not hold (which are random)."""
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if device == "cpu":
        _keep_freed_memory()
    with loading(path):
        model, info = auto.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    try:
        return model.to(device), set(info["missing_keys"])
    except (RuntimeError, AssertionError) as error:  # no such device, or not enough memory on it
        raise CaiError(
            f"{path}: cannot be put on device {device!r}: {str(error).splitlines()[0]}",
            hint="`cai doctor` lists this machine's devices",
        ) from error


def _keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of what is freed. Else it hands large blocks back at once and every forward pass
    faults its pages in anew, which took a third of the time of scoring."""
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest it takes


def pick_device(device: str) -> str:
    """`--device` as torch spells it; auto is cuda where there is one. Raises UsageError, CaiError."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, not {device!r}")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CaiError("this machine has no cuda device", hint="`cai doctor` lists this machine's devices")
    return device


def context_window(config: Any, tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many tokens a model with this config takes at most."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(min(tokenizer.model_max_length, positions or tokenizer.model_max_length))


def tokenizer_and_window(path: Path) -> tuple["PreTrainedTokenizerBase", int]:
    """The tokenizer of the model in `path`, and how many tokens the model takes at most."""
    from transformers import AutoConfig

    from cai_cli.models.loading import load_tokenizer

    tokenizer = load_tokenizer(path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)  # nosec B615
    return tokenizer, context_window(config, tokenizer)
