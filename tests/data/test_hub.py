"""Data sets of the Hub, with directories in the place of the Hub's: `datasets` itself reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.data.hub import HubAddress, hub_rows
from cai_cli.data.jsonl import origin, read_prompts, read_values

README = """---
configs:
- {config_name: a, data_files: [{split: train, path: a-train.jsonl}, {split: test, path: a-test.jsonl}]}
- {config_name: b, data_files: [{split: only, path: b.jsonl}]}
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set `owner/name` of two configurations; `owner/plain` has one, with two splits of other names."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    load, names = datasets.load_dataset, datasets.get_dataset_config_names
    for name, files in (
        ("name", {"README.md": README, "a-train.jsonl": "a train", "a-test.jsonl": "a test", "b.jsonl": "b"}),
        ("plain", {"README.md": README.split("- {config_name: b", maxsplit=1)[0].replace("train", "left").replace("test", "right") + "---\n",
                   "a-left.jsonl": "left", "a-right.jsonl": "right"}),
    ):  # fmt: skip
        folder = tmp_path / "owner" / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            rows = text if file == "README.md" else json.dumps({"prompt": text, "id": None, "more": 1}) + "\n"
            (folder / file).write_text(rows)

    def local(name: str) -> str:
        if not (tmp_path / name).exists():
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return str(tmp_path / name)

    def load_local(path: str, *words: Any, **options: Any) -> Any:
        folder = local(path)
        return load(folder, options.pop("name", None), *words, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, **options: names(local(name)))
    return tmp_path


def prompts(address: str) -> list[str]:
    return [row.prompt[0].content for _, row in read_prompts(f"hf://datasets/owner/{address}")]


def test_a_configuration_and_a_split_are_named_in_the_address(hub: Path) -> None:
    assert prompts("name?config=a") == ["a train"]
    assert prompts("name?config=a&split=test") == ["a test"]
    assert prompts("name?config=b") == ["b"]
    assert [value for _, value in read_values("hf://datasets/owner/name?config=b")] == [{"prompt": "b", "more": 1}]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("name", "several configurations, of which the address names none; it has a, b"),
        ("name?config=c", "no configuration 'c'; it has a, b"),
        ("name?config=a&split=dev", "no split 'dev'; it has train, test"),
        ("plain", "several splits, of which the address names none; it has left, right"),
        ("none", "doesn't exist on the Hub"),
    ],
)
def test_an_error_names_what_the_data_set_has(hub: Path, address: str, said: str) -> None:
    with pytest.raises(CaiError) as error:
        prompts(address)
    assert error.value.code == "cannot-read"
    assert said in error.value.message


@pytest.mark.parametrize(
    "address", ["hf://datasets/owner", "hf://models/o/n", "hf://datasets/o/n?conf=a", "hf://datasets/o/n?config="]
)
def test_an_address_of_another_form_is_a_usage_error(address: str) -> None:
    with pytest.raises(UsageError):
        next(hub_rows(address))


def test_an_address_has_a_file_and_a_revision() -> None:
    parsed = HubAddress.parse("hf://datasets/o/n/data/x.parquet?revision=v1")
    assert (parsed.name, parsed.files, parsed.revision) == ("o/n", "data/x.parquet", "v1")
    assert origin("hf://datasets/o/n?config=a&split=b") == "n"


def test_a_data_set_that_ends_in_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Any:
        yield {"prompt": "one"}
        raise OSError("connection\nlost")

    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: {"train": rows()})
    read = read_prompts("hf://datasets/o/n")
    assert next(read)[0] == 1
    with pytest.raises(CaiError, match="connection lost"):
        next(read)
