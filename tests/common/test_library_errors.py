"""Whose failure an unexpected error is."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.common.library_errors import cannot_write, is_of_a_file, library_failure, library_failures


def function_of(package: str, body: str) -> Callable[..., Any]:
    """`call(inner=None)` in a module of this package."""
    module = ModuleType(f"{package}.inside")
    exec(f"def call(inner=None):\n    {body}", vars(module))  # noqa: S102
    call: Callable[..., Any] = module.call
    return call


def calling(*packages: str, raised: str = "ValueError('boom')") -> Exception:
    """The exception that the last of nested calls, each in a module of its package, raises."""
    call = function_of(packages[-1], f"raise {raised}")
    for package in packages[-2::-1]:
        call = partial(function_of(package, "return inner()"), call)
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("packages", "library"),
    [
        (("cai_cli", "transformers"), "transformers"),
        (("cai_cli", "transformers", "torch"), "transformers"),
        (("cai_cli", "trl", "transformers", "torch"), "transformers"),
        (("cai_cli", "torch"), "torch"),
        (("cai_cli", "trl", "accelerate", "peft", "json"), "PEFT"),
        (("cai_cli", "datasets", "pyarrow"), "datasets"),
        (("cai_cli", "transformers", "cai_cli", "vllm"), "vLLM"),
    ],
)
def test_a_library_that_raises_is_named(packages: tuple[str, ...], library: str) -> None:
    failure = library_failure(calling(*packages))
    assert failure
    assert failure.code == "engine-failed"
    assert failure.message.startswith(library)
    assert "\n" not in failure.message


@pytest.mark.parametrize(
    "packages",
    [("cai_cli",), ("cai_cli", "json"), ("cai_cli", "transformers", "cai_cli"), ("cai_cli", "trl", "cai_cli", "pydantic"), ()],
)  # fmt: skip
def test_an_error_of_our_own_code_stays_a_bug_of_ours(packages: tuple[str, ...]) -> None:
    assert library_failure(calling(*(packages or ("__main__",)))) is None


def test_a_library_that_wraps_what_our_code_raised_is_not_blamed() -> None:
    for own, known in ((calling("cai_cli"), None), (CaiError("no", code="no-rows"), "no-rows")):
        wrapped = calling("cai_cli", "datasets")
        wrapped.__cause__ = own
        failure = library_failure(wrapped)
        assert (failure and failure.code) == known


@pytest.mark.parametrize(
    ("packages", "raised", "code", "hint"),
    [
        (("cai_cli", "transformers", "torch"), "IndexError('index out of range in self')", "engine-failed", "embedding"),
        (("cai_cli", "transformers"), "ValueError('FlashAttention only supports head_dim up to 256')", "engine-failed",
         "--dtype float32"),
        (("cai_cli", "trl", "transformers"), "RuntimeError('head size 16 is refused')", "engine-failed", "--attention"),
        (("cai_cli", "vllm"), "ValueError('1 validation error\\nmax_model_len (9) is larger than the KV cache')",
         "engine-failed", "max_model_len=N"),
        (("cai_cli", "vllm"), "RuntimeError('Engine core initialization failed. See root cause above.')",
         "engine-failed", "messages above"),
        (("cai_cli", "vllm", "torch"), "RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')",
         "not-enough-memory", "gpu_memory_utilization"),
        (("cai_cli", "vllm", "triton"), "RuntimeError('triton CompilationError')", "engine-failed", "enforce_eager"),
        (("cai_cli", "trl", "torch"), "RuntimeError('CUDA out of memory.')", "not-enough-memory",
         "--gradient-accumulation"),
        (("cai_cli",), "MemoryError()", "not-enough-memory", "--batch-size"),
        (("cai_cli",), "RuntimeError('CUDA error: device-side assert triggered')", "engine-failed", "embedding"),
        (("cai_cli", "transformers"), "ImportError('requires the mamba_ssm library')", "missing-dependency", "install"),
        (("cai_cli", "wandb"), "RuntimeError('api_key not configured')", "engine-failed", "--report-to"),
        (("cai_cli", "huggingface_hub", "httpx"), "ConnectionError('[Errno -2] Name or service not known')",
         "download-failed", "network"),
        (("cai_cli", "huggingface_hub"), "OSError('401 Client Error')", "download-failed", "HF_TOKEN"),
        (("cai_cli", "transformers", "torch"), "RuntimeError('PytorchStreamWriter failed writing file')",
         "cannot-write", "disk"),
    ],
)  # fmt: skip
def test_a_known_cause_comes_with_the_setting_that_helps(
    packages: tuple[str, ...], raised: str, code: str, hint: str
) -> None:
    failure = library_failure(calling(*packages, raised=raised))
    assert failure
    assert failure.code == code
    assert hint in str(failure.hint)
    assert "\n" not in failure.message
    assert "validation error" not in failure.message  # the line that says what happened


def test_torchs_own_out_of_memory_error_is_never_a_bug_of_ours() -> None:
    import torch

    error = calling("cai_cli", raised="__import__('torch').OutOfMemoryError('CUDA out of memory.')")
    assert isinstance(error, torch.OutOfMemoryError)
    failure = library_failure(error)
    assert failure
    assert failure.code == "not-enough-memory"


def test_the_context_raises_a_failure_of_a_library_and_leaves_bugs() -> None:
    with pytest.raises(CaiError), library_failures():
        function_of("trl", "raise ValueError")()
    with pytest.raises(ValueError), library_failures():
        function_of("cai_cli", "raise ValueError")()


def test_only_what_failed_to_be_written_is_called_that(tmp_path: Path) -> None:
    inside, outside = str(tmp_path / "checkpoint-1/model"), "/elsewhere/gcc"
    assert cannot_write(OSError(28, "No space left on device"), tmp_path)
    assert cannot_write(PermissionError(13, "Permission denied", inside), tmp_path)
    for other in (FileNotFoundError(2, "No such file", outside), ConnectionRefusedError(111, "refused"), OSError("x")):
        assert not cannot_write(other, tmp_path)
    assert is_of_a_file(OSError(28, "No space left on device"))
    assert not is_of_a_file(ConnectionRefusedError(111, "refused"))
    assert not is_of_a_file(OSError("We couldn't connect to the Hub"))


# --- injected into real commands ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import preference, sample_row, write_rows
    from tiny import tiny_model_dir

    folder = tmp_path_factory.mktemp("failures")
    tiny_model_dir(folder / "tiny")
    write_rows(folder / "samples.jsonl", [sample_row(i, 0) for i in range(4)])
    write_rows(folder / "pairs.jsonl", [preference(i) for i in range(4)])
    (folder / "prompts.txt").write_text("Name a fruit.\nName a town.\n")
    return folder


def smaller_vocabulary(folder: Path, tmp_path: Path) -> Path:
    """The tiny model with embeddings for half of its tokenizer's tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    model.resize_token_embeddings(16)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def commands(folder: Path, model: Path, output: Path) -> dict[str, list[str]]:
    steps = ["--max-steps", "1", "--eval-share", "0", "--device", "cpu"]
    given = {
        "sample": ["prompts.txt", "--max-new-tokens", "2", "--prompt-format", "raw"],
        "sft": ["samples.jsonl", *steps],
        "train-pm": ["pairs.jsonl", *steps],
        "dpo": ["pairs.jsonl", *steps],
    }
    return {
        name: [name, str(folder / words[0]), "-m", str(model), "-o", str(output / name), *words[1:]]
        for name, words in given.items()
    }


@pytest.mark.parametrize("stage", ["sample", "sft", "train-pm", "dpo"])
def test_a_token_without_an_embedding_is_the_models_failure(stage: str, cai: Any, folder: Path, tmp_path: Path) -> None:
    done = cai(*commands(folder, smaller_vocabulary(folder, tmp_path), tmp_path)[stage])
    assert (done.code, done.error or "engine-failed") == (1, "engine-failed")
    assert "Traceback" not in done.stderr
    assert "embedding" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("stage", ["sample", "sft", "train-pm"])
@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')", "not-enough-memory"),
        ("ValueError('head size 8 is not supported')", "engine-failed"),
        ("ImportError('No module named kernels_of_attention')", "missing-dependency"),
    ],
)
def test_what_fails_inside_a_model_is_one_line_with_a_hint(
    stage: str, raised: str, code: str, cai: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers.models.llama import modeling_llama

    def refuse(*_: Any, **__: Any) -> None:
        raise eval(raised, {"torch": torch})  # noqa: S307

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", refuse)
    monkeypatch.setattr("cai_cli.engines.local.prefix_cache.decode_step", lambda _: None)
    done = cai(*commands(folder, folder / "tiny", tmp_path)[stage], "--json")
    assert done.code == 1
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == code
    assert [line[:6] for line in done.stderr.splitlines() if "plain text" not in line] == ["error:", "hint: "]


def test_a_tracker_that_fails_is_not_taken_for_a_full_disk(
    cai: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import TensorBoardCallback

    refuse = function_of("wandb", "raise ConnectionRefusedError(111, 'Connection refused')")
    monkeypatch.setattr(TensorBoardCallback, "on_train_begin", lambda *_, **__: refuse())
    done = cai(*commands(folder, folder / "tiny", tmp_path)["sft"], "--report-to", "tensorboard")
    assert done.code == 1
    assert "wandb" in done.stderr
    assert "cannot write" not in done.stderr
    assert "--report-to" in done.stderr.splitlines()[-1]
