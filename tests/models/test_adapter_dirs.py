"""`BASE+ADAPTER`: what is merged, where it is kept, and which adapters are refused."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.models.adapter_dirs import merge
from cai_cli.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from cai_cli.models.names import public_name, resolve, split_adapter

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model_dir(tmp_path / "base")


def adapter(base: Path, path: Path, *, classifier: bool = False) -> tuple[Path, Any]:
    """A random adapter saved as PEFT saves it, and its output on `IDS`."""
    from peft import LoraConfig, get_peft_model

    model = load_reward_model(base, new_head_seed=3) if classifier else load_causal_lm(base)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS" if classifier else "CAUSAL_LM")
    )
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(path)
    with torch.inference_mode():
        return path, wrapped.eval()(input_ids=IDS).logits


def refused(name: str) -> CaiError:
    with pytest.raises(CaiError) as caught:
        resolve(name)
    return caught.value


def test_a_base_model_and_an_adapter_give_the_outputs_of_both_together(base: Path, tmp_path: Path) -> None:
    path, expected = adapter(base, tmp_path / "lora")
    merged = resolve(f"{base}+{path}")
    with torch.inference_mode():
        torch.testing.assert_close(load_causal_lm(merged)(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert load_tokenizer(merged).chat_template == load_tokenizer(base).chat_template
    written = (merged / "model.safetensors").stat().st_mtime_ns
    assert resolve(f"{base}+{path}") == merged  # it is merged once
    assert (merged / "model.safetensors").stat().st_mtime_ns == written


def test_the_adapter_of_a_preference_model_brings_its_head(base: Path, tmp_path: Path) -> None:
    path, expected = adapter(base, tmp_path / "lora", classifier=True)
    model = load_reward_model(resolve(f"{base}+{path}"))
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    weights = load_file(path / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "score" not in k}, path / "adapter_model.safetensors")
    assert refused(f"{base}+{path}").code == "wrong-model-kind"


def test_the_tokenizer_that_the_adapter_was_trained_with_is_taken(base: Path, tmp_path: Path) -> None:
    path, _ = adapter(base, tmp_path / "lora")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(path)
    assert load_tokenizer(resolve(f"{base}+{path}")).chat_template == "{{ messages[0]['content'] }}"


def test_an_adapter_of_another_model_does_not_fit(base: Path, tmp_path: Path) -> None:
    wide = tiny_model_dir(tmp_path / "wide", hidden_size=64)
    path, _ = adapter(wide, tmp_path / "lora")
    error = refused(f"{base}+{path}")
    assert error.code == "invalid-model"
    assert "does not fit" in error.message
    config = json.loads((path / "adapter_config.json").read_bytes())
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query_key_value"]}))
    assert refused(f"{wide}+{path}").code == "invalid-model"


def test_an_adapter_that_was_trained_on_another_model_of_the_same_shape_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = adapter(base, tmp_path / "lora")
    resolve(f"{base}+{path}")
    assert "warning" not in capsys.readouterr().err
    resolve(f"{tiny_model_dir(tmp_path / 'other', seed=1)}+{path}")
    assert f"trained on {str(base)!r}" in capsys.readouterr().err


def test_the_base_model_that_an_adapter_names_is_not_loaded_unasked(base: Path, tmp_path: Path) -> None:
    path, _ = adapter(base, tmp_path / "lora")
    error = refused(str(path))
    assert error.code == "invalid-model"
    assert str(base) in str(error.hint)
    assert not (tmp_path / "cache/merged").exists()


def test_complete_weights_beside_an_adapter_are_refused_as_ambiguous(base: Path, tmp_path: Path) -> None:
    path, _ = adapter(base, tmp_path / "lora")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(path / file, base / file)
    assert "unclear which" in refused(str(base)).message


def test_pickled_adapters_are_never_loaded(base: Path, tmp_path: Path) -> None:
    path, _ = adapter(base, tmp_path / "lora")
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    assert refused(f"{base}+{path}").code == "unsafe-model"


def test_a_directory_whose_name_has_a_plus_is_one_model(tmp_path: Path) -> None:
    path = tiny_model_dir(tmp_path / "a+b")
    assert resolve(str(path)) == path
    assert split_adapter(f"{path}+lora") == (str(path), "lora")
    assert public_name(f"{path}+lora") == "a+b+lora"


def test_a_directory_that_cannot_be_written_is_said_before_the_model_is_loaded(base: Path, tmp_path: Path) -> None:
    path, _ = adapter(base, tmp_path / "lora")
    (tmp_path / "file").write_text("")
    with patch("cai_cli.models.adapter_dirs.load_tokenizer", side_effect=AssertionError), pytest.raises(CaiError) as no:
        merge(base, path, tmp_path / "file/merged")
    assert no.value.code == "cannot-write"


def test_an_adapter_of_an_unknown_type_is_named_so(base: Path, tmp_path: Path) -> None:
    path, _ = adapter(base, tmp_path / "lora")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "WHAT"}))
    error = refused(f"{base}+{path}")
    assert (error.code, error.message) == ("invalid-model", f"{path}: cannot be loaded: unknown or missing 'WHAT'")
