"""Ten public formats, converted, are read by plain TRL trainers unchanged; TRL's own converters agree with ours."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model_dir

from cai_cli.data.formats import completed_row, parse_preference

pytestmark = pytest.mark.slow

U, G, B = (
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "A pear."},
    {"role": "assistant", "content": "A stone."},
)
HH = "\n\nHuman: Name a fruit.\n\nAssistant: "
REPLIES: dict[str, Any] = {
    "messages": {"messages": [U, G], "lang": "en"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "A pear."}]},
    "Alpaca": {"instruction": "Name a fruit.", "input": "", "output": "A pear."},
    "LMSYS": {"model": "m", "turn": 1, "conversation": [U, G]},
    "TRL prompt and completion": {"prompt": "Name a fruit.", "completion": "A pear."},
    "CSV": 'instruction,response,category\nName a fruit.,A pear.,"open, qa"\n',
}
PAIRS: dict[str, Any] = {
    "UltraFeedback": {"prompt": "Name a fruit.", "prompt_id": "a", "chosen": [U, G], "rejected": [U, B], "score_chosen": 8.0},
    "HH-RLHF": {"chosen": f"{HH}A pear.", "rejected": f"{HH}A stone."},
    "Orca": {"system": "", "question": "Name a fruit.", "chosen": "A pear.", "rejected": "A stone."},
    "implicit prompt": {"chosen": [U, G], "rejected": [U, B]},
}  # fmt: skip


def converted(cai: Cai, folder: Path, formats: dict[str, Any]) -> Any:
    """One dataset of all the formats, as `datasets` loads the files that `cai convert` writes."""
    from datasets import load_dataset

    files = []
    for number, value in enumerate(formats.values()):
        text = value if isinstance(value, str) else json.dumps(value, indent=number % 2 or None) + "\n"
        name = f"in{number}.csv" if isinstance(value, str) else f"in{number}.json"
        (folder / name).write_text(text)
        files.append(f"out{number}.jsonl")
        assert cai("convert", name, "-o", files[-1]).code == 0
    paths = [str(folder / file) for file in files]
    return load_dataset("json", data_files=paths, split="train", cache_dir=str(folder / "cache"))


def arguments(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder / "run"), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": [],
            "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}  # fmt: skip


def test_trl_fine_tunes_on_converted_conversations(cai: Cai, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    data = converted(cai, tmp_path, REPLIES)
    assert [(row["prompt"], row["completion"]) for row in data] == [([U], [G])] * len(REPLIES)
    trainer = SFTTrainer(
        str(tiny_model_dir(tmp_path / "model")), args=SFTConfig(**arguments(tmp_path)), train_dataset=data
    )
    assert trainer.train().training_loss > 0
    assert {"input_ids", "labels"} <= set(trainer.train_dataset.column_names)


def test_trl_trains_a_reward_model_on_converted_pairs(cai: Cai, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    data = converted(cai, tmp_path, PAIRS)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in data] == [([U], [G], [B])] * len(PAIRS)
    trainer = RewardTrainer(
        str(tiny_model_dir(tmp_path / "model")), args=RewardConfig(**arguments(tmp_path)), train_dataset=data
    )
    assert trainer.train().training_loss > 0


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=3))
def test_trl_converts_sharegpt_rows_to_the_same_messages(texts: list[str]) -> None:
    """TRL keeps the names of roles as they are, so the rows here have its own."""
    from trl.data_utils import maybe_convert_to_chatml

    said = [pair for text in texts for pair in (("user", text), ("assistant", f"re {text}"))]
    turns = [{"from": who, "value": text} for who, text in said]
    theirs = maybe_convert_to_chatml({"conversations": [dict(turn) for turn in turns]})["messages"]
    sample = completed_row({"conversations": turns})
    assert [m.model_dump() for m in [*sample.prompt, *sample.completion]] == theirs


@settings(deadline=None)
@given(st.text(min_size=1, max_size=5).filter(str.strip), st.text(max_size=5), st.text(max_size=5))
def test_trl_splits_a_pair_that_parts_at_its_last_turn_in_the_same_place(question: str, one: str, other: str) -> None:
    from trl.data_utils import maybe_extract_prompt

    def whole(reply: str) -> list[dict[str, str]]:
        return [U, G, {"role": "user", "content": question}, {"role": "assistant", "content": reply}]

    pair = {"chosen": whole(f"good {one}"), "rejected": whole(f"bad {other}")}
    ours, theirs = parse_preference(pair, source="s"), maybe_extract_prompt(dict(pair))
    for side in ("prompt", "chosen", "rejected"):
        assert [m.model_dump() for m in getattr(ours, side)] == theirs[side]
