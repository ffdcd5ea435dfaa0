"""Model names: what they resolve to, and the error for a name that nothing has."""

from pathlib import Path

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.models import names


def test_a_whole_local_directory_resolves_to_itself(model_dir: Path) -> None:
    assert names.resolve(str(model_dir)) == model_dir


def test_a_directory_without_config_or_weights_is_refused_by_the_name_of_what_is_missing(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(CaiError, match=r"\*\.safetensors is missing"):
        names.resolve(str(model_dir))
    (model_dir / "config.json").unlink()
    with pytest.raises(CaiError, match=r"config\.json is missing"):
        names.resolve(str(model_dir))


def test_an_adapter_is_refused_as_it_would_load_its_base_model_from_elsewhere(model_dir: Path) -> None:
    (model_dir / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where"}')
    with pytest.raises(CaiError) as error:
        names.resolve(str(model_dir))
    assert error.value.code == "invalid-model"
    (model_dir / "model.safetensors").rename(model_dir / "adapter_model.safetensors")
    with pytest.raises(CaiError, match="not a complete model") as alone:
        names.resolve(str(model_dir))
    assert f"some/where+{model_dir}" in str(alone.value.hint)


@pytest.mark.parametrize("engine", names.ENGINES)
def test_an_engine_is_no_model_to_train(engine: str) -> None:
    with pytest.raises(CaiError) as error:
        names.resolve(f"{engine}:m")
    assert (error.value.code, f"without {engine}:" in str(error.value.hint)) == ("unknown-model", True)


def test_an_unknown_name_is_refused_with_the_names_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(CaiError) as caught:
        names.resolve("gpt-nothing")
    assert caught.value.code == "unknown-model"
    assert "smollm2-135m" in str(caught.value.hint)
    file = tmp_path / "a.safetensors"
    file.touch()
    with pytest.raises(CaiError) as error:
        names.resolve(str(file))
    assert error.value.code == "unknown-model"


@pytest.mark.usefixtures("offline_hub")
def test_a_hub_name_with_the_hub_switched_off_is_one_line_and_a_hint() -> None:
    with pytest.raises(CaiError) as caught:
        names.resolve("some/model")
    assert caught.value.code == "unknown-model"
    assert "\n" not in caught.value.message
    assert "smollm2-135m" in str(caught.value.hint)
