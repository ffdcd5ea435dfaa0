"""Models from the Hub: which files are downloaded, and the errors when the Hub does not answer."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cai_cli.common.errors import CaiError
from cai_cli.models import loading, names


@pytest.mark.timeout(20)
def test_an_unreachable_hub_is_one_line_of_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CaiError) as caught:
        names.resolve("some/model")
    assert caught.value.code == "unknown-model"
    assert "\n" not in caught.value.message


@pytest.mark.usefixtures("offline_hub")
def test_a_cached_hub_model_is_used_with_a_message_when_the_hub_is_off(
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


def test_only_safetensors_and_text_files_of_a_hub_model_are_requested(
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
    with pytest.raises(CaiError) as caught:
        names.resolve("some/other")
    assert caught.value.code == "unknown-model"
    assert "\n" not in caught.value.message
