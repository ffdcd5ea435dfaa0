"""Build .vllm-venv for tests/integration/test_vllm.py: cai and the CPU build of vLLM in an environment of their own.

    python tests/vllm_env.py    # or: make vllm-env

vLLM's versions of some packages differ from those of constraints.txt. It pulls CUDA builds of torchvision, torchaudio
and torchcodec that do not import beside a CPU build of torch; they are removed.
"""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
ENVIRONMENT = TESTS.parent / ".vllm-venv"
PYTHON = ENVIRONMENT / "bin" / "python"


def main() -> None:
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check"]
    # Most of these files are never imported: Python compiles the others at their first import.
    install = [*pip, "install", "--quiet", "--no-compile", "--no-deps"]
    subprocess.run([*install, "-r", TESTS / "vllm_requirements.txt"], check=True)
    subprocess.run([*install, "-e", TESTS.parent], check=True)


if __name__ == "__main__":
    main()
