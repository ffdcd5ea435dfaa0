"""Code in a model, a checkpoint or pickled rows is never run.

Each canary creates a file when it runs; one test shows that the canaries do run where nothing guards against them.
"""

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import interrupted_after, largest_difference, preference, revision, write_rows
from tiny import tiny_model_dir

from cai_cli.cards.model_card import model_card
from cai_cli.common.errors import CaiError
from cai_cli.models.source import ModelSource
from cai_cli.training.checkpoints import SEAL, newest_checkpoint, seal

MODELS = ("sft", "train-pm", "rl", "dpo", "score", "sample")
TRAINING = ("--epochs", "3", "--save-steps", "2", "--batch-size", "4", "--eval-share", "0")
# What Trainer.train reads of a checkpoint, and what it writes there and never reads.
PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


class Canary:
    """Unpickling one creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def archive(trace: Path) -> bytes:
    """A pickle with a canary in the zip form that torch writes today."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Canary(trace), protocol=2))
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return made.getvalue()


def bare(trace: Path) -> bytes:
    """The same as a bare pickle, which torch wrote once."""
    return pickle.dumps(Canary(trace), protocol=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """The file that a canary would create; that none did is checked after every test."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "untrusted code ran"


@pytest.fixture
def untrusted(tmp_path: Path, tiny: Path) -> Path:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}"} for i in range(4)])
    write_rows(tmp_path / "revisions.jsonl", [revision(i) for i in range(4)])
    write_rows(tmp_path / "preferences.jsonl", [preference(i) for i in range(4)])
    return Path(shutil.copytree(tiny, tmp_path / "untrusted"))


def words(stage: str) -> tuple[str, ...]:
    """A command that loads the untrusted model."""
    return {
        "sample": ("sample", "prompts.jsonl", "-o", "out", "--model", "untrusted"),
        "score": ("score", "revisions.jsonl", "-o", "out", "--pm", "untrusted"),
        "sft": ("sft", "revisions.jsonl", "-o", "out", "--model", "untrusted", "--max-steps", "1"),
        "train-pm": ("train-pm", "preferences.jsonl", "-o", "out", "--model", "untrusted", "--max-steps", "1"),
        "rl": ("rl", "prompts.jsonl", "-o", "out", "--model", "untrusted", "--pm", "untrusted", "--steps", "1"),
        "dpo": ("dpo", "preferences.jsonl", "-o", "out", "--model", "untrusted", "--max-steps", "1"),
        "chat": ("chat", "untrusted"),
        "stats": ("stats", "prompts.jsonl", "--tokenizer", "untrusted"),
    }[stage]


def test_the_canaries_run_without_protection(tmp_path: Path) -> None:
    import torch

    for name, form in (("zip", archive), ("bare", bare)):
        with suppress(RuntimeError):  # it looks at what it has unpickled
            torch.load(io.BytesIO(form(tmp_path / name)), weights_only=False)
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("form", [archive, bare])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused_by_every_command(
    name: str, form: Any, cai: Cai, untrusted: Path, trace: Path
) -> None:
    (untrusted / "model.safetensors").unlink()
    (untrusted / name).write_bytes(form(trace))
    for stage in (*MODELS, "chat"):
        done = cai(*words(stage))
        assert (done.code, done.error) == (1, "unsafe-model"), stage


@pytest.mark.parametrize("stage", [*MODELS, "chat", "stats"])
def test_no_command_reads_code_in_a_model_directory(stage: str, cai: Cai, untrusted: Path, trace: Path) -> None:
    """The config asks for the code of `canary.py` and names a class that transformers does not have."""
    (untrusted / "canary.py").write_text(f"open({str(trace)!r}, 'w').close()\nCanary = None\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((untrusted / name).read_text()) | {"model_type": "canary", "tokenizer_class": "Canary"}
        autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
        config["auto_map"] = dict.fromkeys(autos, "canary.Canary") | {"AutoTokenizer": ["canary.Canary"] * 2}
        (untrusted / name).write_text(json.dumps(config))
    done = cai(*words(stage))
    assert "Traceback" not in done.stderr
    if stage != "stats":  # whose tokenizer transformers can read without
        assert (done.code, done.error) == (1, "unsafe-model")


def test_pickles_next_to_safetensors_are_never_opened(cai: Cai, untrusted: Path, trace: Path) -> None:
    for name in ("pytorch_model.bin", *PICKLED):
        (untrusted / name).write_bytes(archive(trace))
    for stage in ("sample", "sft"):
        assert cai(*words(stage), "--overwrite").code == 0


REACHING = (
    "{{ cycler.__init__.__globals__.os.mknod(TRACE) }}",
    "{{ joiner|attr('__init__')|attr('__globals__') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ '{0.__class__.__mro__}'.format(messages) + 1 }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ undefined_function() }}",
    "{% include '/etc/passwd' %}",
    "{% if %}",
    "",
)


@pytest.mark.parametrize("template", REACHING)
def test_a_chat_template_has_no_access_and_its_failures_reject_rows(
    template: str, cai: Cai, untrusted: Path, trace: Path
) -> None:
    """transformers renders templates in jinja2's sandbox."""
    (untrusted / "chat_template.jinja").write_text(template.replace("TRACE", repr(str(trace))))
    done = cai(*words("sample"))
    assert (done.code, done.error) == (1, "all-rejected")
    rejected = (untrusted.parent / "out.rejected.jsonl").read_text()
    assert rejected.count('"reason":"the chat template ') == 4
    assert "root:" not in rejected


# --- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(tmp_path: Path, cai: Cai, tiny: Path) -> Path:
    """The newest checkpoint of a run of `sft` that was killed; what finishes it is `finish`."""
    write_rows(tmp_path / "rev.jsonl", [revision(i, f"answer {i * 7}") for i in range(20)])
    with interrupted_after(7):
        cai("sft", "rev.jsonl", "-o", "out", "--model", str(tiny), *TRAINING)
    return tmp_path / "out.partial/checkpoint-6"


def finish(cai: Cai, tiny: Path, *more: str) -> Any:
    return cai("sft", "rev.jsonl", "-o", "out", "--model", str(tiny), *TRAINING, *more)


@pytest.mark.parametrize("name", [*PICKLED, "model.safetensors", "trainer_state.json"])
def test_a_changed_checkpoint_is_refused(name: str, cai: Cai, killed: Path, tiny: Path, trace: Path) -> None:
    (killed / name).write_bytes(archive(trace))
    done = finish(cai, tiny)
    assert (done.code, done.error) == (1, "invalid-checkpoint")
    assert f"checkpoint-6: {name} " in done.stderr
    assert killed.exists()


def test_a_file_added_to_or_removed_from_a_checkpoint_is_refused(
    cai: Cai, killed: Path, tiny: Path, trace: Path
) -> None:
    (killed / "pytorch_model.bin").write_bytes(archive(trace))
    assert "pytorch_model.bin has changed since" in finish(cai, tiny).stderr
    (killed / "pytorch_model.bin").unlink()
    (killed / "optimizer.pt").unlink()
    assert "optimizer.pt has changed since" in finish(cai, tiny).stderr


def test_without_the_changed_checkpoint_the_run_resumes_from_the_one_before(
    cai: Cai, killed: Path, tiny: Path, tmp_path: Path
) -> None:
    shutil.rmtree(killed)
    assert finish(cai, tiny).code == 0
    assert cai("sft", "rev.jsonl", "-o", "whole", "--model", str(tiny), *TRAINING).code == 0
    assert largest_difference(tmp_path / "whole", tmp_path / "out") == 0


@pytest.mark.parametrize("form", [archive, bare])
@pytest.mark.parametrize("name", PICKLED[:3])
def test_no_pickle_runs_even_in_a_checkpoint_with_a_valid_seal(
    name: str, form: Any, cai: Cai, killed: Path, tiny: Path, trace: Path
) -> None:
    (killed / name).write_bytes(form(trace))
    seal(killed)
    done = finish(cai, tiny)
    assert (done.code, done.error) == (1, "invalid-checkpoint")
    assert "Traceback" not in done.stderr


def test_sha256sum_can_check_a_seal(killed: Path) -> None:
    lines = (killed / SEAL).read_text().splitlines()
    assert {line.split("  ")[1] for line in lines} == {p.name for p in killed.iterdir()} - {SEAL}
    for line in lines:
        digest, name = line.split("  ")
        assert sha256((killed / name).read_bytes()).hexdigest() == digest


def test_a_damaged_seal_is_a_changed_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / SEAL).write_bytes(b"\xff\x00 ../../x\n")
    with pytest.raises(CaiError) as error:
        newest_checkpoint(tmp_path)
    assert error.value.code == "invalid-checkpoint"


def test_principles_and_settings_are_escaped_in_a_model_card(untrusted: Path) -> None:
    evil = "p` |\n\n<script>x</script> \x1b[31m [x](javascript:y)"
    manifest = {
        "provenance": {"stage": "sft", "cai": "0", "input": {evil: "ab"}, "rows": {"sha256": "ab"}, "settings": {evil: evil}},
        "counts": {"in": 1}, "metrics": {evil: {"value": 1.0, "low": 0.0, "high": 1.0, "n": 1}},
        "run": {"principles": [{"constitution": "c", "stage": "s", "fingerprint": "f", "drawn": {evil: 3}}], "training": {}, "versions": {}},
    }  # fmt: skip
    card = model_card(manifest, {"model": ModelSource("base", untrusted, "ab")})
    assert "<script>" not in card
    assert "\x1b" not in card
    assert card.count(r"p` \| \<script\>x\</script\>") == 5


def test_a_hostile_model_card_cannot_stop_training_or_inject_a_license(
    cai: Cai, untrusted: Path, tmp_path: Path
) -> None:
    bombs = (
        "---\na: &a [x, x]\nlicense: [*a, *a]\n---\n", "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
        "---\nlicense: {a: b}\n---\n", "---\n\x00\n---\n", "---\nlicense: MIT\n---\n",
    )  # fmt: skip
    for number, text in enumerate(bombs):
        (untrusted / "README.md").write_text(text)
        done = cai("sft", "revisions.jsonl", "-o", f"out{number}", "--model", "untrusted", "--max-steps", "1")
        assert done.code == 0, done.stderr
        card = (tmp_path / f"out{number}/README.md").read_text()
        assert ("license: mit" in card) == ("MIT" in text)
        assert card.count("license:") <= 1
    (untrusted / "source.json").write_text('{"no": "license"}')
    assert cai("sft", "revisions.jsonl", "-o", "other", "--model", "untrusted", "--max-steps", "1").code == 0
