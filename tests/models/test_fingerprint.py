"""Fingerprints change with the weights and the chat template, and are cached."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from tiny import tiny_model_dir

from cai_cli.common.errors import CaiError
from cai_cli.models import fingerprint


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
    assert (one := fingerprint.fingerprint(model_dir)) != before
    (model_dir / "additional_chat_templates").mkdir()
    (model_dir / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    assert fingerprint.fingerprint(model_dir) != one


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


def test_a_link_to_a_file_that_is_gone_is_an_error_and_not_another_model(model_dir: Path) -> None:
    gone = model_dir / "model-00002-of-00002.safetensors"
    gone.symlink_to(model_dir / "blob")
    with pytest.raises(CaiError, match="links to a file that does not exist") as error:
        fingerprint.fingerprint(model_dir)
    assert error.value.code == "cannot-read"
