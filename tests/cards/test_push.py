"""`cai push`: private by default, and never to the wrong repository."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Cai
from tiny import tiny_model_dir

from cai_cli.cards.push import push
from cai_cli.common.errors import CaiError


class Hub:
    """A stand-in for HfApi that records its calls."""

    def __init__(self, private: bool | None = None, error: Exception | None = None) -> None:
        self.existing, self.error = private, error
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo: str, **arguments: Any) -> Any:
        if self.error:
            raise self.error
        self.calls.append(("create_repo", arguments))
        self.private = arguments["private"] if self.existing is None else self.existing
        return SimpleNamespace(repo_id=f"me/{repo}")

    def repo_info(self, repo: str, **arguments: Any) -> Any:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **arguments: Any) -> Any:
        self.calls.append(("upload_folder", arguments))
        return SimpleNamespace(commit_url="https://huggingface.co/commit/1")


@pytest.fixture
def dataset(cai: Cai, tmp_path: Path, run: Path) -> Path:
    assert cai("export", str(run / "samples.jsonl"), "-o", "ds").code == 0
    return tmp_path / "ds"


def test_a_push_is_private_by_default(dataset: Path) -> None:
    for public in (False, True):
        hub = Hub()
        assert push(dataset, "data", public=public, api=hub) == "https://huggingface.co/commit/1"
        (_, created), (_, uploaded) = hub.calls
        assert created == {"repo_type": "dataset", "private": not public, "exist_ok": True}
        assert (uploaded["repo_id"], uploaded["repo_type"], uploaded["folder_path"]) == ("me/data", "dataset", dataset)


def test_nothing_goes_to_a_repository_that_is_public_already_without_saying_so(dataset: Path) -> None:
    hub = Hub(private=False)
    with pytest.raises(CaiError, match="me/data is public already"):
        push(dataset, "data", public=False, api=hub)
    assert [name for name, _ in hub.calls] == ["create_repo"]
    assert push(dataset, "data", public=True, api=hub)


def test_a_model_is_pushed_with_its_card_and_a_directory_without_one_is_not(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "tiny")
    with pytest.raises(CaiError, match="has no card"):
        push(model, "m", public=False, api=Hub())
    (model / "README.md").write_text("# a model\n")
    hub = Hub()
    push(model, "m", public=False, api=hub)
    assert hub.calls[1][1]["repo_type"] == "model"
    (tmp_path / "other").mkdir()
    with pytest.raises(CaiError, match="neither an exported dataset nor a model"):
        push(tmp_path / "other", "m", public=False, api=Hub())


def test_a_hub_out_of_reach_is_one_line_with_a_way_out(
    cai: Cai, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(error=ConnectionError("no route\nto host")))
    done = cai("push", "ds", "me/data")
    assert done.code == 1
    assert done.stderr.splitlines()[0].startswith("error: cannot push to me/data: ")
    assert "hf auth login" in done.stderr
