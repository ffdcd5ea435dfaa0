"""Tells the failure of a library or a model from a bug in cai.

`library_failure` is the one place that decides. Of the traceback's frames, the innermost that belongs to cai or to one
of LIBRARIES is the one that failed; Python's own modules and other packages act for their caller. Some errors, such as
a full GPU, are not a bug of cai wherever they are raised. CAUSES gives the known ones the setting that helps.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from traceback import walk_tb
from types import FrameType

from cai_cli.common.errors import CaiError

# Package -> its name in messages.
LIBRARIES = {
    "vllm": "vLLM", "trl": "TRL", "transformers": "transformers", "peft": "PEFT", "accelerate": "accelerate",
    "deepspeed": "DeepSpeed", "bitsandbytes": "bitsandbytes", "liger_kernel": "Liger", "flash_attn": "flash-attn",
    "kernels": "kernels", "datasets": "datasets", "huggingface_hub": "huggingface_hub", "wandb": "wandb",
    "mlflow": "MLflow", "trackio": "trackio", "tensorboard": "TensorBoard", "openai": "openai", "ray": "Ray",
}  # fmt: skip
# Packages that other libraries call: one of LIBRARIES among their callers is named instead.
LOW_LEVEL = {
    "torch": "torch", "triton": "Triton", "tokenizers": "tokenizers", "safetensors": "safetensors",
    "pyarrow": "pyarrow", "fsspec": "fsspec", "httpx": "httpx", "requests": "requests", "aiohttp": "aiohttp",
}  # fmt: skip
TRACKERS = frozenset({"wandb", "mlflow", "trackio", "tensorboard"})
TRAINERS = frozenset({"trl", "accelerate"})
OF_THE_HUB = frozenset({"datasets", "huggingface_hub", "fsspec"})
VLLM = frozenset({"vllm"})
AGAIN = "; finished rows and checkpoints are kept, and the same command resumes"
_OWN = "cai_cli"
_LONGEST = 300  # characters of a library's message


@dataclass(frozen=True)
class Cause:
    """A known cause of failures.

    Attributes:
        pattern: Found in "TYPE: message" of the error or of those that it arose from.
        hint: The setting that helps.
        code: The code of the error.
        within: Packages one of which must be among the callers; empty for any.
        anywhere: Whether it is not a bug of cai even where cai's own code raised it.
    """

    pattern: str
    hint: str
    code: str = "engine-failed"
    within: frozenset[str] = frozenset()
    anywhere: bool = False


_MEMORY = r"OutOfMemory|out of memory|can't allocate memory|^MemoryError|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED"
_HEAD_SIZE = r"head[ _]?(size|dim)|only supports? head|No available kernel"
_COMPILER = (
    r"triton|inductor|dynamo|torch\.compile|BackendCompilerFailed|CompilationError|ptxas|nvcc|"
    r"FileNotFoundError.*'(gcc|cc|g\+\+|clang)'|Python\.h"
)
_NETWORK = (
    r"Connection(Error|Refused|Reset)|Connect(ion)?Timeout|Max retries|be reached|Name or service not known|"
    r"name resolution|nodename nor servname|All connection attempts failed|LocalEntryNotFound|Read timed out|"
    r"OfflineMode"
)
_DISK = r"No space left|os error 28|Disk quota|PytorchStreamWriter|enforce fail at inline_container"
_EMBEDDING = r"index out of range in self|device-side assert|indexSelect|srcIndex < srcSelectDimSize"

CAUSES = (
    Cause(_DISK, "free disk space" + AGAIN, "cannot-write"),
    Cause(
        r"kv cache|max_model_len|max_position_embeddings|max_seq_len",
        "--engine-arg max_model_len=N with a smaller window, or --engine-arg gpu_memory_utilization=0.95",
        within=VLLM,
    ),
    Cause(
        _MEMORY + r"|free memory on device",
        "--engine-arg gpu_memory_utilization=X, tensor_parallel_size=N, or a smaller model",
        "not-enough-memory",
        within=VLLM,
        anywhere=True,
    ),
    Cause(_HEAD_SIZE, "--engine-arg attention_backend=NAME with a backend that takes it, or local:NAME", within=VLLM),
    Cause(_COMPILER, "--engine-arg enforce_eager=true runs the model without compiling it", within=VLLM),
    Cause(
        r"EngineDead|engine core|EngineCore|executor failed|WorkerProc|worker.*(died|exited|dead)|died unexpectedly",
        "a process of vLLM ended; its own messages above say why" + AGAIN,
        within=VLLM,
    ),
    Cause("be reached", "start the server as docs/scale.md describes, or check the address", within=VLLM),
    Cause(
        r"not supported|no module or parameter named|not initialized from checkpoint",
        "use it as a local model, local:NAME",
        within=VLLM,
    ),
    Cause(
        _MEMORY,
        "a smaller --batch-size with more --gradient-accumulation, --gradient-checkpointing on, or --lora" + AGAIN,
        "not-enough-memory",
        within=TRAINERS,
        anywhere=True,
    ),
    Cause(_MEMORY, "a smaller --batch-size or a smaller model" + AGAIN, "not-enough-memory", anywhere=True),
    Cause(
        _EMBEDDING,
        "a token id has no embedding: the tokenizer does not belong to the model, or its padding token is outside the "
        "vocabulary in config.json",
        anywhere=True,
    ),
    Cause(_HEAD_SIZE, "--attention eager, which takes every head size", within=TRAINERS),
    Cause(_HEAD_SIZE, "--dtype float32, or vllm:NAME"),
    Cause(_COMPILER, "TORCHDYNAMO_DISABLE=1 runs without compiling; otherwise a C compiler (gcc) may be missing"),
    Cause(
        r"no kernel image|CUDA driver version|CUDA error|AcceleratorError|NCCL|cuDNN|CUDNN",
        "`cai doctor` checks that torch fits the GPU and its driver; NCCL_DEBUG=INFO shows more of NCCL" + AGAIN,
        anywhere=True,
    ),
    Cause(r"^(ImportError|ModuleNotFoundError)", "install the package that the message names", "missing-dependency"),
    Cause(".", "leave --report-to out, or check the tracker's login, address and settings", within=TRACKERS),
    Cause(
        r"401|403|gated|Unauthorized|Forbidden",
        "log in with `hf auth login` or set HF_TOKEN",
        "download-failed",
        within=OF_THE_HUB,
    ),
    Cause(
        _NETWORK,
        "check the network; files that are in the cache need none" + AGAIN,
        "download-failed",
        within=OF_THE_HUB,
    ),
    Cause(_NETWORK, "check the network and the address" + AGAIN),
    Cause(
        r"expected scalar type|same dtype|not implemented for '(Half|BFloat16)'|must have the same dtype",
        "--weights float32",
        within=TRAINERS,
    ),
    Cause(r"expected scalar type|same dtype|not implemented for '(Half|BFloat16)'", "--dtype float32"),
)


def library_failure(error: BaseException, engine: str | None = None) -> CaiError | None:
    """The error to show for an unexpected exception, or None where cai's own code raised it.

    Args:
        error: The exception, with its traceback.
        engine: The package of the only library that the failed code calls, where the caller knows it.

    Returns:
        A CaiError of one line. One of cai's own that a library has wrapped is returned as it is.
    """
    chain = list(_chain(error))
    if own := next((one for one in chain if isinstance(one, CaiError)), None):
        return own
    packages = [_package(frame) for frame in _frames(error)]
    blamed = [engine] if engine else _blamed(packages)
    callers = {*packages, *blamed}
    if not engine and any(_blamed([_package(frame) for frame in _frames(one)]) == [_OWN] for one in chain[1:]):
        blamed = [_OWN]  # a library wrapped what cai's code raised, in a generator or a callback
    is_own = blamed in ([], [_OWN])
    text = "\n".join(f"{type(one).__name__}: {one}" for one in chain)
    cause = next((one for one in CAUSES if _fits(one, text, callers) and (one.anywhere or not is_own)), None)
    if is_own and cause is None:
        return None
    if is_own:  # called by cai's own code without a library between
        name = "Python" if isinstance(error, MemoryError) else "torch"
    else:
        name = _display(next((one for one in blamed if one in LIBRARIES), blamed[0]))
    message = " ".join(str(error).split())[:_LONGEST]
    if cause:
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        telling = next((line for line in lines if re.search(cause.pattern, line, re.IGNORECASE)), message)
        shown = telling[:_LONGEST] or type(error).__name__
        return CaiError(f"{name} failed: {shown}", cause.hint, code=cause.code)
    where = "" if engine else f" ({_places(error)})"
    hint = (
        "its own messages are above; --engine-arg NAME=VALUE sets its settings"
        if "vllm" in blamed
        else "it failed by itself, outside cai's code; if the same works without cai, report it as a bug in cai" + AGAIN
    )
    return CaiError(f"{name} failed: {type(error).__name__}: {message}{where}", hint, code="engine-failed")


@contextmanager
def library_failures(engine: str | None = None) -> Iterator[None]:
    """A context that raises the failures of libraries as CaiError, and leaves bugs in cai as they are.

    Args:
        engine: As for `library_failure`.
    """
    try:
        yield
    except Exception as error:
        failure = library_failure(error, engine)
        if failure is None or failure is error:
            raise
        raise failure from error


def cannot_write(error: OSError, directory: Path) -> bool:
    """Whether writing to `directory` failed, as opposed to a network or a file of a library."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS):
        return True
    return isinstance(error.filename, str) and Path(error.filename).absolute().is_relative_to(directory.absolute())


def is_of_a_file(error: OSError) -> bool:
    """Whether a call of the system on a file or a stream failed, as opposed to a network or a library's own error."""
    return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError) and error.errno > 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it arose from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


def _frames(error: BaseException) -> list[FrameType]:
    """The frames of the traceback, the innermost first."""
    return [frame for frame, _ in walk_tb(error.__traceback__)][::-1]


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _blamed(packages: list[str]) -> list[str]:
    """The packages that failed, the innermost first: [cai_cli], or the libraries since cai's code called them."""
    found: list[str] = []
    for package in packages:
        if package == _OWN:
            return found or [_OWN]
        if package in LIBRARIES or package in LOW_LEVEL:
            found.append(package)
    return found


def _fits(cause: Cause, text: str, callers: set[str]) -> bool:
    within = not cause.within or bool(cause.within & callers)
    return within and re.search(cause.pattern, text, re.IGNORECASE | re.MULTILINE) is not None


def _display(package: str) -> str:
    """The name and version of a library."""
    name = {**LIBRARIES, **LOW_LEVEL}.get(package, package)
    try:
        return f"{name} {version(package)}"
    except PackageNotFoundError:
        return name


def _places(error: BaseException) -> str:
    """Where the library failed, and which line of cai called it."""
    places = [(frame, line) for frame, line in walk_tb(error.__traceback__)][::-1]
    inner = next((at for at in places if _package(at[0]) in {**LIBRARIES, **LOW_LEVEL}), None)
    own = next((at for at in places if _package(at[0]) == _OWN), None)
    named = [f"{frame.f_globals['__name__']}:{line}" for frame, line in (inner, own) if frame] if inner and own else []
    return ", called from ".join(named) or type(error).__name__
