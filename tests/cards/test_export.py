"""`cai export` and `cai push`: datasets that load and train as they are, with a card; nothing public by accident."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Cai
from helpers import sample_row, write_rows
from report_run import HOSTILE, make_run
from tiny import tiny_model_dir

from cai_cli.cards.push import push
from cai_cli.common.errors import CaiError
from cai_cli.training.quiet import quiet_libraries


def loaded(directory: Path, cache: Path) -> Any:
    from datasets import load_dataset

    return load_dataset(str(directory), split="train", cache_dir=str(cache))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "made", rows=8)


@pytest.mark.parametrize("file", ["samples.jsonl", "revisions.jsonl", "preferences.jsonl"])
def test_an_exported_dataset_loads_as_the_rows_it_was_made_of(cai: Cai, tmp_path: Path, run: Path, file: str) -> None:
    done = cai("export", str(run / file), "-o", "ds", "--json")
    assert done.code == 0, done.stderr
    rows = [json.loads(line) for line in (run / file).read_text().splitlines()]
    assert json.loads(done.stdout)["rows"] == len(rows)
    data = loaded(tmp_path / "ds", tmp_path / "cache")
    assert data.to_list() == rows
    assert sorted(p.name for p in (tmp_path / "ds").iterdir()) == ["README.md", "data"]


def test_columns_are_typed_where_every_value_is_null_or_every_list_empty(cai: Cai, tmp_path: Path) -> None:
    from datasets import List, Value

    pair = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go away"}
    write_rows(tmp_path / "hh.jsonl", [pair])
    assert cai("export", "hh.jsonl", "-o", "ds").code == 0
    data = loaded(tmp_path / "ds", tmp_path / "cache")
    assert data.features["votes"] == List({
        "principle_id": Value("string"), "method": Value("string"), "order": Value("string"), "p_first": Value("float64"),
        "rationale": Value("string"),
    })  # fmt: skip
    assert data[0]["human"] == "chosen"
    assert data[0]["prompt"] == [{"role": "user", "content": "hi"}]


def test_the_card_names_principles_data_and_statistics_and_no_folder(cai: Cai, tmp_path: Path, run: Path) -> None:
    from huggingface_hub import DatasetCard

    assert cai("export", str(run / "revisions.jsonl"), "-o", "ds").code == 0
    card = DatasetCard.load(tmp_path / "ds/README.md")
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    text = card.text
    assert "Constitution `cai-critique-revision`" in text
    ids = [t["principle_id"] for line in (run / "revisions.jsonl").read_text().splitlines() for t in json.loads(line)["history"]]  # fmt: skip
    for name in set(ids):
        assert f"| `{name}` | {ids.count(name)} |" in text
    assert "| rows | 8 |" in text
    assert "`cai critique-revise`" in text
    assert "sha256 of `revisions.jsonl`" in text
    assert str(run.parent) not in text


def test_a_hostile_row_cannot_break_out_of_the_card(cai: Cai, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=20, hostile=True)
    assert cai("export", str(run / "revisions.jsonl"), "-o", "ds").code == 0
    text = (tmp_path / "ds/README.md").read_text()
    assert r"\<script\>" in text
    assert not [t for t in HOSTILE[:4] if t in text]
    assert "\x1b" not in text


def test_a_file_without_data_rows_is_refused_and_leaves_nothing(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "rejected.jsonl", [{"key": "1", "reason": "tie", "row": "{}"}])
    write_rows(tmp_path / "bad.jsonl", [sample_row(1), {**sample_row(2), "more": 1}])
    (tmp_path / "empty.jsonl").write_text("")
    for file, code in (
        ("rejected.jsonl", "wrong-row-type"),
        ("bad.jsonl", "invalid-row"),
        ("empty.jsonl", "no-rows"),
        ("none.jsonl", "cannot-read"),
    ):
        done = cai("export", file, "-o", "ds")
        assert (done.code, done.error) == (1, code)
        assert not [p for p in tmp_path.iterdir() if p.name in ("ds", "ds.partial")]
    assert cai("export", "none.jsonl", "-o", "ds").code == 1
    assert cai("export", "-", "-o", "ds").code == 2


def test_only_a_dataset_of_cai_is_ever_replaced(cai: Cai, tmp_path: Path, run: Path) -> None:
    source = str(run / "samples.jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    assert cai("export", source, "-o", "mine", "--overwrite").code == 1
    assert (tmp_path / "mine/thesis.txt").exists()
    assert cai("export", source, "-o", "ds").code == 0
    assert cai("export", source, "-o", "ds").error == "output-exists"
    assert cai("export", source, "-o", "ds", "--overwrite").code == 0


@pytest.mark.parametrize("trainer", ["SFT", "Reward", "DPO"])
def test_trl_trains_on_an_exported_dataset_as_it_is(cai: Cai, tmp_path: Path, run: Path, trainer: str) -> None:
    import trl
    from transformers import AutoModelForSequenceClassification

    from cai_cli.models.loading import load_causal_lm, load_tokenizer

    file = "revisions.jsonl" if trainer == "SFT" else "preferences.jsonl"
    assert cai("export", str(run / file), "-o", "ds").code == 0
    data = loaded(tmp_path / "ds", tmp_path / "cache")
    model_dir = tiny_model_dir(tmp_path / "tiny")
    model: Any = load_causal_lm(model_dir)
    if trainer == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
        model.config.pad_token_id = 0
    arguments = {"output_dir": str(tmp_path / "out"), "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}  # fmt: skip
    with quiet_libraries():
        config = getattr(trl, f"{trainer}Config")(**arguments)
        made = getattr(trl, f"{trainer}Trainer")(
            model=model, args=config, train_dataset=data, processing_class=load_tokenizer(model_dir)
        )
        assert made.train().global_step == 1


# --- push, against a Hub that is not there -----------------------------------------------------------------------------


class Hub:
    """Stands for HfApi: remembers what it was asked."""

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


def test_a_push_is_private_unless_told_otherwise(dataset: Path) -> None:
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
