"""Which engine runs a model without a prefix, on machines with and without CUDA and vLLM."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of
from tiny import tiny_model_dir

from cai_cli.common import console
from cai_cli.engines import choice
from cai_cli.engines.choice import Machine, reason_against_vllm, with_engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def loud() -> None:
    console.set_quiet(False)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """`on(machine)`: the choice is made on this machine."""
    return lambda machine: monkeypatch.setattr(
        choice, "this_machine", lambda device: replace(machine, cuda=machine.cuda and device != "cpu")
    )


def machine(*, cuda: bool = True, vllm: bool = True, knows: tuple[str, ...] = ("LlamaForCausalLM",)) -> Machine:
    return Machine(cuda, vllm, lambda: knows)


def test_vllm_runs_a_model_that_it_knows_on_cuda_and_the_choice_is_printed(
    model: Path, on: Callable[[Machine], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on(machine())
    assert with_engine(str(model), "auto") == f"vllm:{model}"
    assert "vLLM runs it" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        (machine(vllm=False), "vLLM is not installed"),
        (machine(knows=("OtherForCausalLM",)), "vLLM does not know LlamaForCausalLM"),
    ],
)
def test_else_the_local_engine_runs_it_and_the_reason_is_printed(
    model: Path, lacking: Machine, reason: str, on: Callable[[Machine], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on(lacking)
    assert with_engine(str(model), "auto") == f"local:{model}"
    assert (reason_against_vllm(model, lacking) or "").startswith(reason)
    assert reason.rsplit(maxsplit=1)[-1] in capsys.readouterr().err


def test_without_cuda_or_with_a_prefix_the_name_stays_and_nothing_is_printed(
    model: Path, on: Callable[[Machine], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on(machine())
    assert with_engine(f"local:{model}", "auto") == f"local:{model}"
    assert with_engine("openai:m", "auto") == "openai:m"
    assert with_engine(str(model), "cpu") == str(model)
    assert capsys.readouterr().err == ""


def test_a_stage_asks_for_the_choice_and_local_selects_the_local_engine(
    model: Path, cai: Cai, on: Callable[[Machine], None], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("Name a fruit.\n")
    on(machine())
    words = ("sample", "prompts.txt", "-o", "out.jsonl", "--max-new-tokens", "2")
    assert cai(*words, "-m", str(model)).error == "missing-dependency"  # of vLLM, which was chosen
    assert cai(*words, "-m", f"local:{model}").code == 0
    assert manifest_of(tmp_path / "out.jsonl")["provenance"]["model"]["engine"] == "local"
    assert cai(*words, "-m", str(model), "--device", "cpu").code == 0  # the same run
