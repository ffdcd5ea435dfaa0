"""`cai eval lm-eval`: the harness gets the model and the arguments as they are, and its JSON is kept."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.evaluate.lm_eval import command_line

# Writes what it was called with, where the harness writes its results.
STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
path = pathlib.Path(words[words.index("--output_path") + 1])
if "--fail" in words:
    sys.exit("no such task")
results = {"results": {"t": {"acc,none": 0.5, "acc_stderr,none": 0.25}}, "date": 1.0, "argv": words}
path.with_name("results_2026-01-01.json").write_text(json.dumps(results))
print("a table")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the model that changes its answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "path" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(str(package.parent))


def test_the_model_and_its_adapter_are_named_to_the_harness_beside_the_arguments(model: Path, adapter: Path) -> None:
    given = ["--tasks", "a", "b", "--model_args", "dtype=float32", "trust=no", "--limit", "3"]
    words = command_line(f"{model}+{adapter}", given, Path("r.json"))
    assert words == [
        "--model", "hf", "--model_args", f"pretrained={model}", f"peft={adapter}", "dtype=float32", "trust=no",
        "--output_path", "r.json", "--tasks", "a", "b", "--limit", "3",
    ]  # fmt: skip
    plain = command_line(str(model), ["-t", "a", "--model_args=dtype=float32"], Path("r.json"))
    assert plain[3:5] == [f"pretrained={model}", "dtype=float32"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--tasks", "a", "--model", "vllm"], "option-conflict"), (["--tasks", "a", "--output_path=x"], "option-conflict"),
     (["--limit", "3"], "missing-option")],
)  # fmt: skip
def test_arguments_that_this_command_sets_are_refused_and_tasks_are_needed(
    arguments: list[str], code: str, model: Path
) -> None:
    with pytest.raises(UsageError) as error:
        command_line(str(model), arguments, Path("r.json"))
    assert error.value.code == code
    assert error.value.hint


def test_an_adapter_alone_and_a_preference_model_are_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        command_line(str(adapter), ["--tasks", "a"], Path("r.json"))
    assert error.value.hint == "name its base model too: BASE+ADAPTER"
    scores = tiny_model_dir(tmp_path / "pm")
    config = json.loads((scores / "config.json").read_text())
    (scores / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(CaiError) as wrong:
        command_line(str(scores), ["--tasks", "a"], Path("r.json"))
    assert wrong.value.code == "wrong-model-kind"


@pytest.mark.usefixtures("stand_in")
def test_the_json_of_the_harness_is_kept_with_the_name_of_the_model(cai: Cai, model: Path, tmp_path: Path) -> None:
    words = ["eval", "lm-eval", str(model), "-o", "before.lm-eval.json"]
    done = cai(*words, "--name", "before", "--json", "--", "--tasks", "t", "--limit", "2")
    assert done.code == 0, done.stderr
    kept = json.loads((tmp_path / "before.lm-eval.json").read_text())
    assert json.loads(done.stdout) == kept
    assert kept["results"] == {"t": {"acc,none": 0.5, "acc_stderr,none": 0.25}}
    assert kept["argv"][:4] == ["run", "--model", "hf", "--model_args"]
    assert kept["argv"][-4:] == ["--tasks", "t", "--limit", "2"]
    assert kept["cai"]["model"] == "before"
    assert len(kept["cai"]["fingerprint"]) == 64
    assert cai(*words, "--", "--tasks", "t").error == "output-exists"
    assert cai(*words[:3], "-o", "x.json", "--", "--tasks", "t").error == "invalid-option"
    failed = cai(*words, "--overwrite", "--", "--tasks", "t", "--fail")
    assert (failed.code, failed.error) == (1, "engine-failed")


def test_without_the_harness_the_extra_is_named(cai: Cai, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("cai_cli.evaluate.lm_eval.find_spec", lambda name: None)
    done = cai("eval", "lm-eval", str(model), "--", "--tasks", "t")
    assert done.error == "missing-dependency"
    assert "pip install '.[bench]'" in done.stderr


TASK = {
    "task": "fruit", "dataset_path": "json", "validation_split": "validation", "output_type": "multiple_choice",
    "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs `pip install '.[bench]'`")
def test_models_that_cai_writes_load_in_the_harness(
    cai: Cai, model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"Is {i} a fruit?", "choices": ["no", "yes"], "answer": i % 2} for i in range(6)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task: dict[str, Any] = TASK | {"dataset_kwargs": {"data_files": {"validation": str(tmp_path / "q.jsonl")}}}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "fruit.yaml").write_text(json.dumps(task))
    arguments = ["--", "--tasks", "fruit", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    for name, directory in (("before", str(model)), ("after", f"{model}+{adapter}")):
        done = cai("eval", "lm-eval", directory, "-o", f"{name}.lm-eval.json", *arguments)
        assert done.code == 0, done.stderr
        kept = json.loads((tmp_path / f"{name}.lm-eval.json").read_text())
        assert kept["n-samples"]["fruit"]["effective"] == 6
        assert 0 <= kept["results"]["fruit"]["acc,none"] <= 1
        assert ("peft" in kept["config"]["model_args"]) == (name == "after")
