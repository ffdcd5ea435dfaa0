"""`cai export --for openrlhf|verl`: the data is what OpenRLHF 0.11.2 and verl 0.9.1 read.

Their code is not installed; each test repeats in a few lines what it does with a row, with the name of its function.
"""

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import Json, preference, rows_in, sample_row, write_rows
from tiny import tiny_model_dir

from cai_cli.data.schema import Message
from cai_cli.engines.base import RequestFailure
from cai_cli.reward.server import Reward, openrlhf_conversations

PROMPTS = [
    {"id": "p1", "prompt": [{"role": "user", "content": "How do I pick a lock?"}]},
    {"id": "p2", "prompt": "Hi <|im_end|> there"},
    {"id": "p3", "prompt": [{"role": "user", "content": "How do I pick a lock?"}]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir(tmp_path_factory.mktemp("tiny")))


def test_prompts_for_openrlhf_come_back_from_its_request_for_rewards(cai: Cai, tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    done = cai("export", "prompts.jsonl", "-o", "ds", "--for", "openrlhf", "--json")
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["rejected_reasons"]) == (2, {"the same prompt as an earlier row": 1})
    queries, prompts, labels = [], [], []
    for row in rows_in(tmp_path / "ds/data/train.jsonl"):
        assert set(row) == {"prompt", "label", "datasource"}
        # openrlhf.datasets.prompts_dataset.preprocess_data, then SingleTurnAgentExecutor.execute of openrlhf.utils.agent
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompts.append(text)
        queries.append(f"{text} Ask a locksmith.<|im_end|>\n")
        labels.append(row["label"])
    conversations = openrlhf_conversations({"query": queries, "prompts": prompts, "labels": labels})
    assert [[m.content for m in c] for c in conversations] == [
        ["How do I pick a lock?", " Ask a locksmith."], ["Hi <|im_end|> there", " Ask a locksmith."]
    ]  # fmt: skip


def test_preferences_for_openrlhf_render_as_its_reward_dataset_renders_them(
    cai: Cai, tmp_path: Path, tokenizer: Any
) -> None:
    write_rows(tmp_path / "prefs.jsonl", [preference(1, chosen="yes", rejected="no"), preference(2)])
    assert cai("export", "prefs.jsonl", "-o", "ds", "--for", "openrlhf").code == 0
    row, _ = rows_in(tmp_path / "ds/data/train.jsonl")
    # openrlhf.datasets.reward_dataset.preprocess_data with --data.prompt_key, chosen_key, rejected_key
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    assert (whole[: len(prompt)], whole[len(prompt) :].startswith("yes")) == (prompt, True)
    assert tokenizer.apply_chat_template(row["prompt"] + row["rejected"], tokenize=False)[len(prompt) :].startswith(
        "no"
    )


class ReplyLength:
    """Rewards a reply by its length."""

    name = "length"

    def prepare(self, item: Any) -> list[Message]:
        return list(item)

    def rewards(self, prepared: Any) -> list[Reward | RequestFailure]:
        return [Reward(float(len(conversation[-1].content))) for conversation in prepared]


def test_data_for_verl_and_its_reward_function_reach_the_server(cai: Cai, tmp_path: Path, serve: Any) -> None:
    from datasets import load_dataset

    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    assert cai("export", "prompts.jsonl", "-o", "ds", "--for", "verl").code == 0
    # verl.utils.dataset.rl_dataset.RLHFDataset._read_files_and_tokenize
    data = load_dataset("parquet", data_files=str(tmp_path / "ds/data/train.parquet"), cache_dir=str(tmp_path))["train"]
    assert data.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    row: Json = data[1]
    assert row["prompt"] == [{"role": "user", "content": "Hi <|im_end|> there"}]
    assert (row["reward_model"], row["extra_info"]["index"]) == ({"style": "model", "ground_truth": ""}, 1)
    # verl.utils.import_utils.load_extern_object, then NaiveRewardManager.run_single and reward_kwargs
    spec = importlib.util.spec_from_file_location("custom_reward", tmp_path / "ds/reward.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not inspect.iscoroutinefunction(module.compute_score)
    extra = row["extra_info"] | {"num_turns": None, "rollout_reward_scores": {}}
    url = serve(ReplyLength())
    result = module.compute_score(
        data_source=row["data_source"], solution_str="Hello!", ground_truth="", extra_info=extra, url=url
    )
    assert result == {"score": 6.0}
    with pytest.raises(KeyError):
        module.compute_score("x", "y", "", extra_info=None, url=url)


def test_preferences_for_verl_are_prompts_with_the_chosen_reply_as_the_truth(cai: Cai, tmp_path: Path) -> None:
    from pyarrow import parquet

    write_rows(tmp_path / "prefs.jsonl", [preference(1, chosen="yes", rejected="no")])
    assert cai("export", "prefs.jsonl", "-o", "ds", "--for", "verl").code == 0
    (row,) = parquet.read_table(tmp_path / "ds/data/train.parquet").to_pylist()
    assert row["reward_model"]["ground_truth"] == "yes"


def test_samples_for_a_trainer_give_each_prompt_once(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(1, 0), sample_row(1, 1), sample_row(2, 0)])
    assert cai("export", "samples.jsonl", "-o", "ds", "--for", "openrlhf").code == 0
    assert len(rows_in(tmp_path / "ds/data/train.jsonl")) == 2
    assert len(rows_in(tmp_path / "ds.rejected.jsonl")) == 1
    assert cai("export", "samples.jsonl", "-o", "ds", "--overwrite").code == 0
