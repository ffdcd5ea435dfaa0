"""Scores depend on the conversation alone, and are read where the model was trained to be read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from local_models import ROPE_LIMIT, model_dir
from tiny import CHATML, END_OF_TEXT, IM_END, tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.data.schema import Message
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.loading import load_reward_model, load_tokenizer, reading_of
from cai_cli.models.reading import ReadAt, Reading, record_place, reply_header
from cai_cli.models.source import ModelSource
from cai_cli.reward.packed_pairs import enable_packed_pairs
from cai_cli.reward.preference_model import (
    encode_conversation,
    open_for_scores,
    preference_model_identity,
    score_conversations,
    score_ids,
)
from cai_cli.training.quiet import quiet_libraries

PAIRS = [
    ("Name a fruit.", "A pear.", "A stone is what I would name if you asked me once more."),
    ("Name a town.", "Bern, which is a town in the middle of a small country.", "Blue."),
    ("Name a river, please.", "The Rhine.", "A cup."),
    ("Hi", "Hello to you, and how may I help you?", "Go."),
]
ENDS_WITH_ITS_END = CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")  # as Llama 3 does
TEXT_ONLY = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"  # no control token
END_AFTER_REPLY = (  # as Vicuna and Mistral do
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% else %}"
    "{{ m['content'] + ' Assistant: ' }}{% endif %}{% endfor %}"
)
TEMPLATES = {  # kind -> template and padding token; without one, the end-of-sequence token is used
    "a line break after the end of turn": (CHATML, END_OF_TEXT),
    "a line break, padding is the end of turn": (CHATML, None),
    "nothing after the end of turn": (ENDS_WITH_ITS_END, END_OF_TEXT),
    "nothing, padding is the end of turn": (ENDS_WITH_ITS_END, None),
    "an end after the reply only": (END_AFTER_REPLY, END_OF_TEXT),
    "an end after the reply only, which is the padding": (END_AFTER_REPLY, IM_END),
    "text only": (TEXT_ONLY, END_OF_TEXT),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


def conversation(prompt: str, reply: str) -> list[Message]:
    return [Message(role="user", content=prompt), Message(role="assistant", content=reply)]


CHATS = [conversation(prompt, reply) for prompt, *replies in PAIRS for reply in replies]


def base_of(path: Path, kind: str) -> Path:
    """A tiny language model with this kind of chat template and of padding token."""
    template, padding = TEMPLATES[kind]
    return tiny_model_dir(path, chat_template=template, pad_token=padding)


def preference_model(path: Path, base: Path) -> Path:
    """A preference model with a random head, saved with its tokenizer."""
    with quiet_libraries():
        load_reward_model(base, new_head_seed=0).save_pretrained(path)
        load_tokenizer(base).save_pretrained(path)
    return path


def test_white_space_around_a_reply_is_not_scored(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    replies = ("well", " \n well\n\n")
    for at in ReadAt:
        plain, padded = (encode_conversation(tokenizer, conversation("hi", reply), Reading(at)) for reply in replies)
        assert plain == padded


def test_a_score_does_not_depend_on_neighbours_with_other_positions() -> None:
    path = model_dir("longrope")
    pm, tokenizer = load_reward_model(path, new_head_seed=0), load_tokenizer(path)
    chats = [conversation("question " * n, "helpful") for n in range(1, 12)]
    lengths = [len(encode_conversation(tokenizer, chat, pm.reading)) for chat in chats]
    assert min(lengths) < ROPE_LIMIT < max(lengths)
    alone = [score_conversations(pm, tokenizer, [chat])[0] for chat in chats]
    assert score_conversations(pm, tokenizer, chats, batch_size=11) == pytest.approx(alone, abs=1e-4)
    longest = ([*range(3, 3 + ROPE_LIMIT + 1)], [3, 4, 5])
    assert not enable_packed_pairs(pm, longest)
    assert enable_packed_pairs(pm, (longest[0][:ROPE_LIMIT], [3, 4, 5]))


def test_a_conversation_beyond_the_window_is_an_error_with_both_numbers(model: Path) -> None:
    pm, tokenizer = load_reward_model(model, new_head_seed=0), load_tokenizer(model)
    with pytest.raises(CaiError, match=r"tokens does not fit .* window of 512") as error:
        score_conversations(pm, tokenizer, [conversation("hi", "word " * 600)])
    assert error.value.code == "too-long"


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [END_OF_TEXT, IM_END, None])
@pytest.mark.parametrize("at", ReadAt)
def test_a_score_depends_on_neither_batch_nor_neighbours(tmp_path: Path, padding: str | None, at: ReadAt) -> None:
    base = tiny_model_dir(tmp_path / "tiny", chat_template=ENDS_WITH_ITS_END, pad_token=padding)
    pm, tokenizer = load_reward_model(base, new_head_seed=0), load_tokenizer(base)
    pads = at in (ReadAt.LAST_UNPADDED, ReadAt.WHOLE_TEMPLATE)
    pm.reading = Reading(at, tokenizer.pad_token_id if pads else None, reply_header(tokenizer))
    chats = [conversation("question " * n, "helpful " * (9 - n)) for n in range(1, 9)]
    alone = [score_conversations(pm, tokenizer, [chat])[0] for chat in chats]
    assert score_conversations(pm, tokenizer, chats, batch_size=3) == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == len(alone)


def wrapped_preference_model(path: Path) -> Path:
    """A preference model inside a wrapper for vision, whose config has a text config."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tiny_model_dir(path.with_name("base"))
    tokenizer = load_tokenizer(path.with_name("base"))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    with quiet_libraries():
        wrapper = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, pad_token_id=0))
        wrapper.save_pretrained(path.with_name("base"))
    record_place(preference_model(path, path.with_name("base")))
    return path


def test_a_text_config_that_pads_otherwise_than_the_tokenizer_does_not_change_a_score(tmp_path: Path) -> None:
    path = wrapped_preference_model(tmp_path / "pm")
    config = json.loads((path / "config.json").read_text())
    scores = []
    for padding in (0, 2, None):
        config["text_config"]["pad_token_id"] = padding
        (path / "config.json").write_text(json.dumps(config))
        pm, tokenizer = load_reward_model(path), load_tokenizer(path)
        assert pm.config.get_text_config().pad_token_id == pm.config.pad_token_id == tokenizer.pad_token_id == 0
        scores += [score_conversations(pm, tokenizer, CHATS[:4], size) for size in (4, 1)]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-4)


# --- models of `cai train-pm` -------------------------------------------------------------------------------------


def test_a_closed_reply_and_one_that_is_not_have_different_scores_where_the_end_of_turn_is_the_padding(
    tmp_path: Path,
) -> None:
    base = base_of(tmp_path / "tiny", "nothing, padding is the end of turn")
    pm, tokenizer = load_reward_model(base, new_head_seed=0), load_tokenizer(base)
    closed = encode_conversation(tokenizer, CHATS[0], Reading())
    assert closed[-1] == tokenizer.pad_token_id == tokenizer.eos_token_id
    one, other = score_ids(pm, tokenizer, [closed, closed[:-1]], 2)
    assert abs(one - other) > 0.1


def scores_of_transformers(directory: Path, sequences: Sequence[Sequence[int]]) -> list[float]:
    """The scores of transformers' own forward pass, each sequence alone, read at its last token that is not padding."""
    import torch
    from transformers import AutoModelForSequenceClassification

    with quiet_libraries(), torch.inference_mode():
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
        return [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_model_of_version_0_1_0_has_the_scores_that_it_had(tmp_path: Path, kind: str) -> None:
    path = preference_model(tmp_path / "pm", base_of(tmp_path / "tiny", kind))
    (path / "README.md").write_text("---\ntags:\n- constitutional-ai\n- cai-train-pm\n- trl\n---\n")
    pm, tokenizer = open_for_scores(path, "cpu")
    sequences = []
    for chat in CHATS:  # as version 0.1.0 encoded them
        ids = encode_chat(tokenizer, chat, add_generation_prompt=False)
        while tokenizer.decode(ids[-1]).isspace():
            del ids[-1]
        sequences.append(ids)
    expected = scores_of_transformers(path, sequences)
    assert score_conversations(pm, tokenizer, CHATS, batch_size=3) == pytest.approx(expected, abs=1e-3)
    assert set(preference_model_identity(ModelSource.resolve(str(path)))) == {"fingerprint"}


# --- models of others ---------------------------------------------------------------------------------------------


def trained_by_trl(base: Path, out: Path) -> list[float]:
    """Train a reward model with plain TRL into `out` and return its scores of `CHATS`."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    def chat(prompt: str, reply: str) -> list[dict[str, Any]]:
        return [message.model_dump() for message in conversation(prompt, reply)]

    rows = [{"chosen": chat(p, chosen), "rejected": chat(p, rejected)} for p, chosen, rejected in PAIRS]
    arguments = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False}  # fmt: skip
    with quiet_libraries():
        trainer = RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32),
            args=RewardConfig(str(out.with_name("work")), **arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        trainer.train()
        trainer.save_model(str(out))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    with torch.inference_mode():
        chosen, rejected = trainer.model.eval()(**batch).logits[:, 0].chunk(2)
    return [float(score) for pair in zip(chosen, rejected, strict=True) for score in pair]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_reward_model_of_plain_trl_has_the_scores_of_trl(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trained_by_trl(base_of(tmp_path / "tiny", kind), tmp_path / "rm")
    pm, tokenizer = open_for_scores(tmp_path / "rm", "cpu")
    assert "rm was not trained by `cai train-pm`" in capsys.readouterr().err
    assert score_conversations(pm, tokenizer, CHATS, batch_size=3) == pytest.approx(expected, abs=1e-3)
    identity = preference_model_identity(ModelSource.resolve(str(tmp_path / "rm")))
    assert identity["read_at"] == "whole-template"


def test_a_model_without_any_padding_token_is_read_at_its_very_last_token(tmp_path: Path) -> None:
    path = preference_model(tmp_path / "rm", base_of(tmp_path / "tiny", "nothing, padding is the end of turn"))
    config = json.loads((path / "config.json").read_text()) | {"pad_token_id": None}
    (path / "config.json").write_text(json.dumps(config))
    tokenizer_config = json.loads((path / "tokenizer_config.json").read_text()) | {"pad_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert reading_of(path) == Reading(ReadAt.WHOLE_TEMPLATE, None)
    pm, tokenizer = open_for_scores(path, "cpu")
    ids = [encode_chat(tokenizer, chat, add_generation_prompt=False) for chat in CHATS]
    assert score_conversations(pm, tokenizer, CHATS) == pytest.approx(scores_of_transformers(path, ids), abs=1e-3)
