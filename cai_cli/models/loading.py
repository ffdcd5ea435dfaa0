"""Loads models and tokenizers from directories, without running code that comes with them."""

import copy
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.common.library_errors import library_failure
from cai_cli.models.chat_template import apply_given_template
from cai_cli.models.fetch import check_model_dir, loading
from cai_cli.models.reading import ReadAt, Reading, check_reading, layer_of, place_of, read_last_token, reply_header
from cai_cli.models.shards import undivided, unread_here, without_weights
from cai_cli.models.template_date import hold_template_date, refuse_random_template
from cai_cli.models.text_part import freeze_beside_text

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16")


def load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a model directory, with padding on the left (as generation needs it).

    If it has no padding token, or one for which the model has no embedding, another token takes that role (the
    end-of-sequence token, or the first one), so mask by `attention_mask`, not by id.

    Raises:
        CaiError: There is no tokenizer (`invalid-model`), or it needs custom code (`unsafe-model`).
    """
    tokenizer = _tokenizer(path)
    size = _vocabulary(path)
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= size:
        ends = tokenizer.eos_token_id is not None and tokenizer.eos_token_id < size
        tokenizer.pad_token = tokenizer.eos_token if ends else tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _vocabulary(path: Path) -> int:
    """The number of tokens for which the model in a directory has embeddings; as many as there are without a config."""
    if not (path / "config.json").is_file():
        return sys.maxsize
    with loading(path):
        return int(getattr(load_config(path).get_text_config(), "vocab_size", None) or sys.maxsize)


def _tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer as it is, with or without a padding token."""
    from transformers import AutoTokenizer

    hold_template_date()
    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615
            path, trust_remote_code=False, local_files_only=True, padding_side="left"
        )
    apply_given_template(path, tokenizer)
    templates = tokenizer.chat_template or ""
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        refuse_random_template(template)
    return tokenizer


def load_generation_config(path: Path) -> "GenerationConfig":
    """The generation config of the model in a directory, without loading the model.

    Raises:
        CaiError: The directory is not that of a model (`invalid-model`).
    """
    from transformers import AutoConfig, GenerationConfig

    with loading(path):
        if (path / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(path, local_files_only=True)  # nosec B615
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)  # nosec B615
        return GenerationConfig.from_model_config(config)


def model_type(path: Path) -> str:
    """The type of the model in a directory, as `config.json` names it ("llama"). Raises CaiError."""
    from transformers import AutoConfig

    check_model_dir(path)
    with loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)  # nosec B615
    return str(config.model_type)


def load_causal_lm(
    path: Path,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    attention: str | None = None,
    quantize: str | None = None,
    sharded: bool = False,
) -> "PreTrainedModel":
    """The language model in a directory, in evaluation mode.

    Args:
        path: The directory of the model.
        dtype: The data type of its weights, one of `DTYPES`.
        device: The device as torch names it.
        attention: The implementation of attention, by its name in transformers; None for its default.
        quantize: "4bit" to hold the linear layers in 4 bits and compute in `dtype`, else None.
        sharded: Whether a trainer is to divide the weights among the processes: they stay on the CPU, and only the
            first process of each machine reads them, or each reads its share with ZeRO-3.

    Raises:
        CaiError: The directory is not that of a complete language model (`invalid-model`, `wrong-model-kind`), the
            model needs custom code (`unsafe-model`), or the device is missing or too small (`no-device`).
        UsageError: `dtype` is unknown.
    """
    check_model_dir(path)
    if is_classifier(path):
        raise CaiError(f"{path}: a preference model, not a language model", code="wrong-model-kind")
    options = _memory_options(attention, quantize, dtype)
    model, missing = _load(_class_for(path), path, dtype, device, sharded, **options)
    if missing:
        raise CaiError(f"{path}: weights are missing: {', '.join(sorted(missing)[:3])}", code="invalid-model")
    return model


def load_reward_model(
    path: Path,
    dtype: str = "float32",
    device: str = "cpu",
    new_head_seed: int | None = None,
    *,
    attention: str | None = None,
    quantize: str | None = None,
    sharded: bool = False,
    reading: Reading | None = None,
) -> "PreTrainedModel":
    """The preference model in a directory: a sequence classifier with one output, in evaluation mode.

    A decoder gives its score at the last token that the attention mask does not hide. `model.reading` says which token
    of a conversation that must be: that of `reading_of`, or for a model to train that of `train-pm`.

    Args:
        path: The directory of the model.
        dtype: The data type of its weights, one of `DTYPES`. A decoder's head is float32 in any case: a score in
            bfloat16 would have three digits.
        device: The device as torch names it.
        attention: As in `load_causal_lm`, like `quantize`.
        new_head_seed: If given, `path` may be a language model to start training from, and this seed initialises its
            scalar head. If None, a missing head is an error, because a random head would give random rewards.
        sharded: As for `load_causal_lm`.
        reading: Where a model to train is read; None for the end of the turn.

    Raises:
        CaiError: As `load_causal_lm`, or the model cannot be read there (`wrong-model-kind`, `invalid-layer`).
        UsageError: `dtype` is unknown.
    """
    import torch

    check_model_dir(path)
    check_one_output(path)
    tokenizer = load_tokenizer(path)
    with torch.random.fork_rng(devices=[], enabled=new_head_seed is not None):
        if new_head_seed is not None:
            torch.manual_seed(new_head_seed)
        options = _memory_options(attention, quantize, dtype) | {"num_labels": 1}
        model, missing = _load(_class_for(path, classifier=True), path, dtype, device, sharded, **options)
    head = {name for name in missing if name.split(".")[0] in ("score", "classifier")}
    if missing - head or (head and new_head_seed is None):
        raise CaiError(
            f"{path}: not a preference model (weights are missing: {', '.join(sorted(missing)[:3])})",
            hint="`cai train-pm` trains one from a language model",
            code="wrong-model-kind",
        )
    for config in (model.config, model.config.get_text_config()):  # a wrapper of several models has a config of each
        config.pad_token_id = tokenizer.pad_token_id
    reading = reading_of(path) if new_head_seed is None else reading or Reading()
    # A model of another kind reads where transformers does, and must be given all tokens.
    reads_last = read_last_token(model)
    model.reading = reading if reads_last else Reading(reading.at)
    check_reading(model, reading)
    if reads_last:
        model.score.float()
    return model


def check_one_output(path: Path) -> None:
    """Check that the model in a directory is not a classifier of several labels, such as safe and unsafe.

    None of its outputs alone is a score, and nothing says which of its labels is the better one.

    Raises:
        CaiError: It is one (`wrong-model-kind`), or its config cannot be read.
    """
    if not (path / "config.json").is_file() or not is_classifier(path):
        return
    config = json.loads((path / "config.json").read_bytes())
    names = config.get("id2label")
    labels = list(names.values()) if isinstance(names, dict) else []
    count = len(labels) or config.get("num_labels") or 1
    if count == 1:
        return
    named = f" ({', '.join(map(str, labels[:6]))}{', ...' if count > 6 else ''})" if labels else ""
    raise CaiError(
        f"{path}: a classifier of {count} labels{named}, not a preference model, which has one output",
        hint="use a reward model with one output (num_labels 1), or train one with `cai train-pm`",
        code="wrong-model-kind",
    )


def load_float32_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model that was loaded as `model`, loaded again: whole, on the CPU, in float32.

    Args:
        model: A model of `load_causal_lm` or `load_reward_model`, in any precision.
    """
    import torch

    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    path = Path(config._name_or_path)
    with loading(path), undivided():
        again: PreTrainedModel = type(model).from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return again


def _memory_options(attention: str | None, quantize: str | None, dtype: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` for `attention` and `quantize`."""
    import torch

    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if quantize:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            bnb_4bit_quant_storage=getattr(torch, dtype),  # as the other weights, or FSDP could not shard them
            llm_int8_skip_modules=["lm_head", "score", "classifier"],
        )
    return options


def reading_of(path: Path) -> Reading:
    """Where the score of the preference model in a directory is read.

    Raises:
        CaiError: The tokenizer cannot be loaded, or the record in the directory is not valid (`invalid-model`).
    """
    at = place_of(path)
    if at is ReadAt.END_OF_TURN:
        return Reading(at, layer=layer_of(path))
    if at is ReadAt.MEAN_OVER_REPLY:
        return Reading(at, header=reply_header(load_tokenizer(path)), layer=layer_of(path))
    if at is ReadAt.LAST_UNPADDED:
        return Reading(at, load_tokenizer(path).pad_token_id)
    # The end-of-sequence token that `load_tokenizer` falls back on is not what the model was trained with.
    padding = _tokenizer(path).pad_token_id
    return Reading(at, load_config(path).get_text_config().pad_token_id if padding is None else padding)


def is_classifier(path: Path) -> bool:
    """Whether the model in a directory is a sequence classifier, by its config."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
    except (ValueError, AttributeError) as error:
        raise CaiError(f"{path / 'config.json'}: not a model's config: {error}", code="invalid-model") from error


def _class_for(path: Path, *, classifier: bool = False) -> Any:
    """The class of transformers that loads the model in a directory.

    A language model for images and text that has no class of its own for text alone is loaded whole.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto as known

    with loading(path):
        config = load_config(path)
    if classifier:
        classes = {AutoModelForSequenceClassification: known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING}
    else:
        classes = {
            AutoModelForCausalLM: known.MODEL_FOR_CAUSAL_LM_MAPPING,
            AutoModelForImageTextToText: known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        }
    for auto, mapping in classes.items():
        if type(config) in mapping:
            return auto
    role = "preference models" if classifier else "language models"
    raise CaiError(
        f"{path}: transformers has no {role} of type {config.model_type!r}",
        hint="use a model of another type",
        code="wrong-model-kind",
    )


def _load(
    auto: Any, path: Path, dtype: str, device: str, sharded: bool, **options: Any
) -> tuple["PreTrainedModel", set[str]]:
    """The model, and the names of the parameters that are missing in `path` (they are random)."""
    import torch

    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", code="invalid-option")
    if device == "cpu":
        _keep_freed_memory()
    precision = getattr(torch, dtype)
    quantized = "quantization_config" in options  # such a model is quantised as it loads, and cannot be moved
    with loading(path):
        if sharded and not quantized and unread_here():
            return without_weights(auto, path, precision, **options), set()
        with nullcontext() if sharded else undivided():
            model, info = auto.from_pretrained(
                path,
                dtype=precision,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **({"device_map": {"": device}} if quantized else {}),
                **options,
            )
    freeze_beside_text(model)
    try:
        return model if quantized or sharded else model.to(device), set(info["missing_keys"])
    except (RuntimeError, AssertionError) as error:  # no such device, or not enough memory on it
        if (failure := library_failure(error)) and failure.code == "not-enough-memory":
            raise CaiError(f"{path}: {failure.message}", failure.hint, code=failure.code) from error
        raise CaiError(
            f"{path}: cannot be put on device {device!r}: {str(error).splitlines()[0]}",
            hint="`cai doctor` lists this machine's devices",
            code="no-device",
        ) from error


def _keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory.

    By default it returns large blocks to the system at once, and every forward pass then faults their pages in again,
    which took a third of the time of scoring.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: the largest it takes


def pick_device(device: str) -> str:
    """The device for `--device`, as torch names it; "auto" is cuda if available.

    Raises:
        UsageError: `device` is not "auto", "cpu" or "cuda".
        CaiError: This machine has no cuda device (`no-device`).
    """
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, not {device!r}", code="invalid-option")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise CaiError(
            "this machine has no cuda device", hint="`cai doctor` lists this machine's devices", code="no-device"
        )
    return device


def auto_dtype(device: str) -> str:
    """The precision that "auto" is on a device: bfloat16 on a GPU, float32 on a CPU.

    Args:
        device: The device as torch names it, such as "cpu" or "cuda:1".
    """
    return "bfloat16" if device.startswith("cuda") else "float32"


def context_window(config: Any, tokenizer: "PreTrainedTokenizerBase") -> int:
    """The context window in tokens of a model with this config and tokenizer."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(min(tokenizer.model_max_length, positions or tokenizer.model_max_length))


def tokenizer_and_window(path: Path) -> tuple["PreTrainedTokenizerBase", int]:
    """The tokenizer of the model in a directory, and the model's context window in tokens."""
    tokenizer = load_tokenizer(path)
    return tokenizer, context_window(load_config(path), tokenizer)


def load_config(path: Path) -> Any:
    """The config of the model in a directory."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)  # nosec B615
