"""Model names and the Hub, what is never run, fingerprints, loading, `cai models`."""

import hashlib
import json
import os
import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model_dir
from typer.testing import CliRunner

from cai_cli.cli import models
from cai_cli.common.errors import CaiError, UsageError
from cai_cli.models import fingerprint, loading, names


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


# --- names


def test_a_whole_local_directory_resolves_to_itself(model_dir: Path) -> None:
    assert names.resolve(str(model_dir)) == model_dir


def test_a_directory_without_config_or_weights_is_refused_by_the_name_of_what_is_missing(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(CaiError, match=r"\*\.safetensors is missing"):
        names.resolve(str(model_dir))
    (model_dir / "config.json").unlink()
    with pytest.raises(CaiError, match=r"config\.json is missing"):
        names.resolve(str(model_dir))


def test_an_adapter_is_refused_as_it_would_load_its_base_model_from_elsewhere(model_dir: Path) -> None:
    (model_dir / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where"}')
    with pytest.raises(CaiError, match="adapter"):
        names.resolve(str(model_dir))


def test_a_word_that_is_nothing_is_refused_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(CaiError) as caught:
        names.resolve("gpt-nothing")
    assert caught.value.code == "unknown-model"
    assert "smollm2-135m" in str(caught.value.hint)
    file = tmp_path / "a.safetensors"
    file.touch()
    with pytest.raises(CaiError) as error:
        names.resolve(str(file))
    assert error.value.code == "unknown-model"


@pytest.mark.usefixtures("offline_hub")
def test_a_hub_name_with_the_hub_switched_off_is_one_line_and_a_hint() -> None:
    with pytest.raises(CaiError, match="HF_HUB_OFFLINE is set") as caught:
        names.resolve("some/model")
    assert caught.value.code == "unknown-model"
    assert "\n" not in caught.value.message
    assert "smollm2-135m" in str(caught.value.hint)


def test_an_unreachable_hub_is_one_line_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(CaiError, match="the Hub does not answer") as caught:
        names.resolve("some/model")
    assert caught.value.code == "unknown-model"
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
    assert names.resolve("some/model") == repo / "snapshots" / ("a" * 40)
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
    path = names.resolve("some/model")
    assert "some/model: from the Hub, revision bbbbbbbbbbbb, license mit" in capsys.readouterr().err
    assert sorted(file.name for file in path.iterdir()) == sorted(
        file.name for file in model_dir.iterdir() if file.name not in [*unwanted, "onnx"]
    )
    assert loading.load_causal_lm(path).config.hidden_size == 32
    assert not [asked for asked in hub.asked if any(asked.endswith(name) for name in unwanted)]


@pytest.mark.usefixtures("hub")
def test_a_name_the_hub_does_not_have_is_one_line() -> None:
    with pytest.raises(CaiError, match="no such model on the Hub") as caught:
        names.resolve("some/other")
    assert caught.value.code == "unknown-model"
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
    for use in (lambda: names.resolve(str(model_dir)), lambda: loading.load_causal_lm(model_dir)):
        with pytest.raises(CaiError, match=r"pickled weights \(pytorch_model\.bin\).*run code") as error:
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


def test_the_code_of_a_model_is_never_run_though_its_config_asks_for_it(tmp_path: Path, model_dir: Path) -> None:
    own_code(model_dir, tmp_path / "ran", model_type="canary")
    for load in (loading.load_causal_lm, loading.load_reward_model):
        with pytest.raises(CaiError, match=r"auto_map.*never run") as error:
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


# --- fingerprints


def settle(model_dir: Path) -> None:
    """Date every file back, so that its digest may be remembered."""
    for file in model_dir.iterdir():
        os.utime(file, (1_700_000_000, 1_700_000_000))


def test_a_fingerprint_changes_with_one_byte_of_the_weights(model_dir: Path) -> None:
    settle(model_dir)
    before = fingerprint.fingerprint(model_dir)
    assert fingerprint.fingerprint(model_dir) == before
    with (model_dir / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)[0]
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))
    assert fingerprint.fingerprint(model_dir) != before


def test_a_file_changed_twice_within_a_tick_of_its_clock_is_still_seen(model_dir: Path) -> None:
    config = model_dir / "config.json"
    now = time.time_ns()
    seen = set()
    for width in ("0.2", "0.3"):
        config.write_text(config.read_text().replace('"initializer_range": 0.2', f'"initializer_range": {width}'))
        os.utime(config, ns=(now, now))
        seen.add(fingerprint.fingerprint(model_dir))
    assert len(seen) == 2


def test_a_fingerprint_changes_with_the_chat_template_but_not_with_a_model_card(model_dir: Path) -> None:
    before = fingerprint.fingerprint(model_dir)
    (model_dir / "README.md").write_text("a card")
    assert fingerprint.fingerprint(model_dir) == before
    (model_dir / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint.fingerprint(model_dir) != before


def test_equal_models_in_two_places_have_one_fingerprint(tmp_path: Path, model_dir: Path) -> None:
    assert fingerprint.fingerprint(tiny_model_dir(tmp_path / "again")) == fingerprint.fingerprint(model_dir)
    assert fingerprint.fingerprint(tiny_model_dir(tmp_path / "other", seed=1)) != fingerprint.fingerprint(model_dir)


def test_a_second_fingerprint_reads_no_weights(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(model_dir)
    before = fingerprint.fingerprint(model_dir)
    monkeypatch.setattr(fingerprint, "file_digest", None)
    assert fingerprint.fingerprint(model_dir) == before


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"FILE": 3}', '{"FILE": [1, 2]}', '{"FILE": []}', "\xff\x00"])
def test_a_broken_digest_cache_is_ignored(model_dir: Path, cache: Path, content: str) -> None:
    before = fingerprint.fingerprint(model_dir)
    settle(model_dir)
    cache.mkdir(exist_ok=True)
    file = str((model_dir / "config.json").resolve())
    (cache / "digests.json").write_bytes(content.replace("FILE", file).encode("latin-1"))
    assert fingerprint.fingerprint(model_dir) == before
    assert file in json.loads((cache / "digests.json").read_text())


def test_many_fingerprints_at_once_leave_a_whole_digest_cache(tmp_path: Path, cache: Path) -> None:
    made = [tiny_model_dir(tmp_path / f"m{number}", seed=number) for number in range(4)]
    for model_dir in made:
        settle(model_dir)
    threads = [threading.Thread(target=fingerprint.fingerprint, args=(made[number % 4],)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((cache / "digests.json").read_text())
    assert [path.name for path in cache.iterdir()] == ["digests.json"]


def test_a_cache_that_cannot_be_written_costs_no_fingerprint(model_dir: Path, cache: Path) -> None:
    settle(model_dir)
    cache.write_text("a file where the folder should be")
    assert len(fingerprint.fingerprint(model_dir)) == 64


# --- loading


def test_a_tokenizer_pads_on_the_left_and_falls_back_to_the_end_token(model_dir: Path) -> None:
    assert loading.load_tokenizer(model_dir).pad_token_id == 0
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = loading.load_tokenizer(model_dir)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|im_end|>")
    del config["eos_token"]
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CaiError, match="neither a padding nor an end-of-sequence token"):
        loading.load_tokenizer(model_dir)


def test_a_language_model_is_loaded_quietly_in_the_asked_dtype(
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


def test_a_preference_model_needs_its_head_unless_a_new_one_is_asked_for(tmp_path: Path, model_dir: Path) -> None:
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


@pytest.mark.slow
def test_the_real_alias_answers_a_plain_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # back to the user's own cache
    path = names.resolve("smollm2-135m")
    model, tokenizer = loading.load_causal_lm(path), loading.load_tokenizer(path)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True) == "The capital of France is Paris."
