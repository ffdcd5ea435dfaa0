"""The commands of docs/starting_points.md, in their order, on tiny models and a server on loopback."""

import json
from pathlib import Path
from string import Template

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in, write_rows
from loopback import Loopback
from server_forms import vllm
from thinking_models import SWITCHED, taught, thinking_model_dir
from tiny import tiny_model_dir

PAGE = Path(__file__).parents[2] / "docs/starting_points.md"
PROMPT = "Name a fruit."


def page_commands() -> list[str]:
    blocks = PAGE.read_text(encoding="utf-8").split("```text\n")[1:]
    return [line for block in blocks for line in block.partition("```")[0].splitlines()]


def write_inputs(folder: Path) -> None:
    turns = [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": "A pear."}]
    (folder / "sharegpt.json").write_text(json.dumps([{"conversations": turns, "model": "other"}]))
    (folder / "prompts.txt").write_text(
        f"{PROMPT}\nName a town.\n"
    )  # the second is taught to no model: its replies differ
    chats = [[{"role": "user", "content": f"Name fruit {i}."}] for i in range(8)]
    replies = [[{"role": "assistant", "content": text}] for text in ("A pear.", "No.")]
    scores = {"score_chosen": 8.0, "score_rejected": 7.0}
    pairs = ({"prompt": c[0]["content"], "chosen": c + replies[0], "rejected": c + replies[1], **scores} for c in chats)
    write_rows(folder / "ultrafeedback.jsonl", pairs)


def write_models(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_model_dir(folder / "base", max_position_embeddings=2048)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder / "adapter")
    thinker = thinking_model_dir(folder / "thinker", SWITCHED)
    taught(thinker, PROMPT, "<think>\nA fruit, hm.\n</think>\n\nA pear.<|im_end|>")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_page_run_in_their_order(cai: Cai, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    write_inputs(tmp_path)
    write_models(tmp_path)
    with Loopback(vllm) as server:
        names = {"MODEL": "base", "THINKER": "thinker", "ADAPTER": "adapter", "JUDGE": "m", "URL": server.url}
        for line in page_commands():
            done = cai(*Template(line).substitute(names).split()[1:])
            revises = "critique-revise" in line  # a random model does not write what a revision must be
            assert done.error == "all-rejected" if revises and done.code else done.code == 0, f"{line}\n{done.stderr}"
    assert "A fruit, hm." in {row["thoughts"] for row in rows_in(tmp_path / "samples.jsonl")}
    assert {round(row["p_chosen"], 3) for row in rows_in(tmp_path / "pairs.jsonl")} == {0.731}
    assert manifest_of(tmp_path / "trial.jsonl")["run"]["usage"]["cost"] > 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["model_type"] == "llama"


def test_the_readme_and_the_index_link_the_page() -> None:
    root = PAGE.parents[1]
    assert "(docs/starting_points.md)" in (root / "README.md").read_text(encoding="utf-8")
    assert "(starting_points.md)" in (root / "docs/index.md").read_text(encoding="utf-8")
