"""Compiles `decode_kernels.c` with the C compiler of this machine, once for each machine, and calls it.

A decoding step of one token a row is thousands of small operations in torch, and its attention is products with a few
rows each, which torch's libraries do at a fraction of the memory bandwidth. Here both are a few calls a layer.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.models.fetch import cache_dir

if TYPE_CHECKING:
    from torch import Tensor

_SOURCE = Path(__file__).with_suffix(".c")
# No option allows another order of additions. The library links no OpenMP of its own: it finds the one that torch has
# loaded, because two pools of threads in one process wait for each other's cores.
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fopenmp", "-fno-math-errno", "-fPIC")
LANES = 16  # as in the source: keys are stored in a multiple of this many columns
_POINTERS = (
    "query key value cosines sines query_norm key_norm keys values prefix_keys prefix_values lengths out scratch"
)
_NUMBERS = "rows heads key_heads size rotary columns shared prefix_columns longest window threads"


class Attention(ctypes.Structure):
    """The arguments of `attend`; the source says what they are."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_long) for name in _NUMBERS.split()),
        *((name, ctypes.c_float) for name in ("eps", "scaling", "softcap")),
    ]


@cache
def library() -> Any:
    """The compiled functions, or None where they cannot be compiled or loaded: torch's own operations do the same."""
    import torch  # noqa: F401 - its OpenMP must be loaded first

    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if platform.system() != "Linux" or not compiler:
        return None
    try:
        functions = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    long, real, pointer = ctypes.c_long, ctypes.c_float, ctypes.c_void_p
    functions.attend.argtypes = [ctypes.POINTER(Attention)]
    functions.add_norm.argtypes = [pointer, pointer, pointer, real, pointer, long, long, long]
    functions.gate.argtypes = [pointer, pointer, long, long, long]
    functions.split.argtypes = [pointer, pointer, pointer, long, long, long]
    functions.join.argtypes = [pointer, pointer, long, long, long]
    for function in (functions.attend, functions.add_norm, functions.gate, functions.split, functions.join):
        function.restype = None
    return functions


def _compiled(compiler: str) -> Path:
    """The compiled library in the cache directory. Its name tells apart sources, compilers and processors, because a
    home directory may be shared by unlike machines."""
    version = subprocess.run([*compiler.split(), "--version"], capture_output=True, check=True, timeout=60).stdout  # noqa: S603
    processor = [line for line in _processor().splitlines() if line.startswith(("model name", "flags", "Features"))]
    key = "\n".join([_SOURCE.read_text(), *_FLAGS, version.decode(), platform.machine(), *sorted(set(processor))])
    library = cache_dir() / "compiled" / f"decode_kernels-{blake2b(key.encode(), digest_size=8).hexdigest()}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as made:
        objects, whole = f"{made}/kernels.o", f"{made}/kernels.so"
        for words in (["-c", str(_SOURCE), *_FLAGS, "-o", objects], ["-shared", objects, "-o", whole, "-lm"]):
            subprocess.run([*compiler.split(), *words], capture_output=True, check=True, timeout=300)  # noqa: S603
        Path(whole).replace(library)  # whole or not at all, if two processes compile at once
    return library


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def address(tensor: "Tensor | None") -> int | None:
    """The address of a tensor's first element, for a call of the library."""
    return None if tensor is None else tensor.data_ptr()
