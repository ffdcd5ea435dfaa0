"""Loading of models and tokenizers, which never runs code or pickles of a model."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.models import loading, names
from cai_cli.models.loading import pick_device

# --- nothing of a model is ever run


class Canary:
    """Unpickling one writes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_a_directory_with_only_pickled_weights_is_refused_unread(tmp_path: Path, model_dir: Path) -> None:
    trace = tmp_path / "ran"
    (model_dir / "model.safetensors").unlink()
    (model_dir / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(trace)))
    for use in (lambda: names.resolve(str(model_dir)), lambda: loading.load_causal_lm(model_dir)):
        with pytest.raises(CaiError) as error:
            use()
        assert error.value.code == "unsafe-model"
    assert not trace.exists()


def own_code(model_dir: Path, trace: Path, **config: object) -> None:
    (model_dir / "canary.py").write_text(f"open({str(trace)!r}, 'w').close()\nCanaryConfig = Canary = None\n")
    for name in ("config.json", "tokenizer_config.json"):
        known = json.loads((model_dir / name).read_text()) | config
        known["auto_map"] = {
            "AutoConfig": "canary.CanaryConfig",
            "AutoModelForCausalLM": "canary.Canary",
            "AutoTokenizer": ["canary.Canary", None],
        }
        (model_dir / name).write_text(json.dumps(known))


def test_the_code_of_a_model_is_never_run_even_if_its_config_requests_it(tmp_path: Path, model_dir: Path) -> None:
    own_code(model_dir, tmp_path / "ran", model_type="canary")
    for load in (loading.load_causal_lm, loading.load_reward_model):
        with pytest.raises(CaiError) as error:
            load(model_dir)
        assert error.value.code == "unsafe-model"
    assert not (tmp_path / "ran").exists()


def test_a_model_transformers_knows_is_loaded_natively_without_running_its_own_code(
    tmp_path: Path, model_dir: Path
) -> None:
    own_code(model_dir, tmp_path / "ran")
    assert type(loading.load_causal_lm(model_dir)).__name__ == "LlamaForCausalLM"
    assert loading.load_tokenizer(model_dir).eos_token_id == 2
    assert not (tmp_path / "ran").exists()


# --- loading


def test_a_tokenizer_pads_on_the_left_and_falls_back_to_the_end_token(model_dir: Path) -> None:
    assert loading.load_tokenizer(model_dir).pad_token_id == 0
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = loading.load_tokenizer(model_dir)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|im_end|>")


def test_a_language_model_is_loaded_quietly_in_the_requested_dtype(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loading.load_causal_lm(model_dir, dtype="bfloat16")
    assert not model.training
    assert model.dtype is torch.bfloat16
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError) as error:
        loading.load_causal_lm(model_dir, dtype="float8")
    assert error.value.code == "invalid-option"
    with pytest.raises(CaiError) as error:
        loading.load_causal_lm(model_dir, device="toaster")
    assert error.value.code == "no-device"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_torn_model_file_is_a_one_line_error(model_dir: Path, name: str) -> None:
    content = (model_dir / name).read_bytes()
    (model_dir / name).write_bytes(content[: len(content) // 2])
    load = loading.load_tokenizer if name == "tokenizer.json" else loading.load_causal_lm
    with pytest.raises(CaiError) as caught:
        load(model_dir)
    assert "\n" not in caught.value.message


def test_a_model_with_a_missing_weight_is_refused_instead_of_filled_with_noise(model_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaiError, match=r"weights are missing: model\.layers\.1\.mlp\.up_proj"):
        loading.load_causal_lm(model_dir)
    with pytest.raises(CaiError) as error:
        loading.load_reward_model(model_dir, new_head_seed=0)
    assert error.value.code == "wrong-model-kind"


def test_a_preference_model_needs_its_head_unless_a_new_one_is_requested(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(CaiError) as error:
        loading.load_reward_model(model_dir)
    assert error.value.code == "wrong-model-kind"
    config = json.loads((model_dir / "config.json").read_text()) | {"pad_token_id": None}
    (model_dir / "config.json").write_text(json.dumps(config))
    state = torch.random.get_rng_state()
    model, same, other = (loading.load_reward_model(model_dir, new_head_seed=seed) for seed in (7, 7, 8))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(model.score.weight, same.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    assert model.score.weight.shape == (1, 32)
    assert model.config.pad_token_id == 0

    saved = tmp_path / "pm"
    model.save_pretrained(saved)
    loading.load_tokenizer(model_dir).save_pretrained(saved)
    assert torch.equal(loading.load_reward_model(saved).score.weight, model.score.weight)
    with pytest.raises(CaiError) as error:
        loading.load_causal_lm(saved)
    assert error.value.code == "wrong-model-kind"


# --- cai models


@pytest.mark.slow
def test_the_real_alias_answers_a_plain_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # back to the user's own cache
    path = names.resolve("smollm2-135m")
    model, tokenizer = loading.load_causal_lm(path), loading.load_tokenizer(path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True) == "The capital of France is Paris."


def test_an_unknown_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError) as error:
        pick_device("tpu")
    assert error.value.code == "invalid-option"


def test_some_token_pads_where_the_tokenizer_has_none_or_one_that_the_model_does_not_know(model_dir: Path) -> None:
    file = model_dir / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({name: value for name, value in config.items() if name not in ("pad_token", "eos_token")})
    )
    assert loading.load_tokenizer(model_dir).pad_token_id == 0
    file.write_text(json.dumps(config | {"pad_token": "[PAD]"}))
    tokenizer = loading.load_tokenizer(model_dir)
    assert len(tokenizer) > loading.load_causal_lm(model_dir).config.vocab_size
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_classifier_of_several_labels_is_no_preference_model_and_its_labels_are_named(
    model_dir: Path, cai: Any, tmp_path: Path
) -> None:
    from helpers import preference, write_rows
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    judge = tmp_path / "safety"
    AutoModelForSequenceClassification.from_pretrained(
        model_dir, num_labels=2, id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1}
    ).save_pretrained(judge)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(judge)
    write_rows(tmp_path / "pairs.jsonl", [preference(i) for i in range(2)])
    write_rows(
        tmp_path / "questions.jsonl",
        [{"id": "a", "prompt": "Name a fruit.", "options": ["A pear.", "A stone."], "label": 0}],
    )
    (tmp_path / "prompts.txt").write_text("".join(f"Name fruit {i}.\n" for i in range(8)))
    rl = ["rl", "prompts.txt", "-m", str(model_dir), "-o", "policy", "--steps", "1", "--device", "cpu"]
    for words in (
        ["score", "pairs.jsonl", "--pm", "safety", "-o", "s.jsonl"],
        ["score", "pairs.jsonl", "--pm", "safety", "--pm-url", "http://127.0.0.1:9/classify", "-o", "s.jsonl"],
        [*rl, "--pm", "safety"],
        ["dpo", "pairs.jsonl", "-m", str(model_dir), "--monitor-pm", "safety", "-o", "d", "--device", "cpu"],
        ["train-pm", "pairs.jsonl", "-m", "safety", "-o", "pm", "--device", "cpu"],
        ["eval", "compare", "a=pairs.jsonl", "b=pairs.jsonl", "--pm", "safety", "-o", "c.jsonl"],
        ["serve-reward", "safety", "--port", "0"],
    ):
        done = cai(*words)
        assert (done.code, done.error) == (1, "wrong-model-kind"), (words, done.stderr)
        assert "a classifier of 2 labels (safe, unsafe)" in done.stderr
