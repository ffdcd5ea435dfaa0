"""Where the score of a preference model is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.models.fingerprint import fingerprint
from cai_cli.models.reading import RECORD, ReadAt, place_of, read_last_token, record_place

OLD = Path(__file__).parent.parent / "data/v0.1.0/models"


def test_the_record_in_the_directory_decides_and_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    model = tiny_model_dir(tmp_path / "pm")
    before = fingerprint(model)
    assert place_of(model) is ReadAt.WHOLE_TEMPLATE
    record_place(model)
    assert place_of(model) is ReadAt.END_OF_TURN
    assert fingerprint(model) != before


def test_a_model_of_version_0_1_0_is_recognised_by_its_card_or_the_manifest_beside_it(tmp_path: Path) -> None:
    assert place_of(OLD / "pm") is ReadAt.LAST_UNPADDED
    shutil.copytree(OLD / "pm", tmp_path / "with card")
    assert place_of(tmp_path / "with card") is ReadAt.LAST_UNPADDED
    (tmp_path / "pm").mkdir()
    assert place_of(tmp_path / "pm") is ReadAt.WHOLE_TEMPLATE
    shutil.copyfile(OLD / "pm.manifest.json", tmp_path / "pm.manifest.json")
    assert place_of(tmp_path / "pm") is ReadAt.LAST_UNPADDED
    assert place_of(OLD / "sl-cai") is ReadAt.WHOLE_TEMPLATE


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"read_at": "somewhere"})])
def test_a_record_that_is_not_valid_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(CaiError) as error:
        place_of(tmp_path)
    assert error.value.code == "invalid-model"


SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "biogpt": SHAPE,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": SHAPE,
    "gemma2": SHAPE | {"num_key_value_heads": 1, "head_dim": 8},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": SHAPE,
    "gptj": GPT2 | {"rotary_dim": 4},
    "llama": SHAPE,
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 2},
    "openai-gpt": GPT2,
    "opt": SHAPE | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "phi3": SHAPE | {"num_key_value_heads": 1},
    "qwen3": SHAPE | {"num_key_value_heads": 1, "head_dim": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_decoder_gives_the_score_of_transformers_where_no_padding_token_is_read(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=64, pad_token_id=0, num_labels=1, **FAMILIES[family])
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.score.weight.data.normal_()
    ids = torch.tensor([[5, 9, 7, 3, 8], [6, 4, 2, 0, 0]])
    mask = (ids != 0).long()
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
        assert read_last_token(model)
        assert model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
        padded_with_its_last_token = torch.where(mask.bool(), ids, 2)
        again = model(input_ids=padded_with_its_last_token, attention_mask=mask).logits[:, 0].tolist()
    assert again == pytest.approx(expected, abs=1e-5)


def test_an_encoder_is_left_unchanged() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=1, **SHAPE))
    assert not read_last_token(model)
    assert "forward" not in vars(model)
