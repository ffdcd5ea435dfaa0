"""Outputs appear whole, and are replaced only on request."""

import gzip
import os
from pathlib import Path

import pytest
import zstandard
from conftest import Cai
from helpers import Died, manifest_of, rows_in, write_rows
from stage_cases import WORDS

from cai_cli.common.errors import CaiError
from cai_cli.data.jsonl import read_prompts, read_values
from cai_cli.runtime.output_files import one_writer


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(143)])
def test_an_interrupted_writer_says_how_it_goes_on(
    stop: BaseException | type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((KeyboardInterrupt, SystemExit)), one_writer(tmp_path / "out.jsonl"):
        raise stop
    assert "run the same command again to complete" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl.lock").exists()


@pytest.mark.parametrize("moment", ["before the output is renamed", "before the manifest is renamed"])
def test_a_run_that_dies_while_publishing_is_completed_without_new_requests(
    moment: str, cai: Cai, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        name = Path(target).name
        if name == ("out.jsonl" if "output" in moment else "out.jsonl.manifest.json"):
            raise Died
        replace(source, target)

    assert cai(*WORDS["sample"], "-o", "calm.jsonl").code == 0
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Died):
        cai(*WORDS["sample"], "-o", "out.jsonl")
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr("cai_cli.phase1_supervised.sample.sample", None)  # asking again would call it
    assert cai(*WORDS["sample"], "-o", "out.jsonl").code == 0
    assert (inputs / "out.jsonl").read_bytes() == (inputs / "calm.jsonl").read_bytes()
    assert manifest_of(inputs / "out.jsonl")["counts"] == manifest_of(inputs / "calm.jsonl")["counts"]
    assert not list(inputs.glob("*.partial*"))


@pytest.mark.parametrize("output", [".", "/", ".."])
def test_an_output_that_is_not_a_file_is_a_usage_error(output: str, cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["yes"]}])
    (tmp_path / "prompts.txt").write_text("why?\n")
    refused = cai("sample", "prompts.txt", "-o", output, "--model", "scripted:script.jsonl")
    assert (refused.code, refused.error, refused.stdout) == (2, "invalid-option", "")


def test_an_overwritten_output_is_kept_until_the_new_one_is_whole(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["yes"]}])
    words = ("-o", "out.jsonl", "--model", "scripted:script.jsonl", "--overwrite")
    (tmp_path / "prompts.txt").write_text("why?\n")
    assert cai("sample", "prompts.txt", *words).code == 0
    before = {p.name: p.read_bytes() for p in tmp_path.glob("out.jsonl*")}
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\n')
    assert cai("sample", "bad.jsonl", *words).code == 1
    assert cai("sample", "bad.jsonl", *words).code == 1
    assert (tmp_path / "out.jsonl.old").read_bytes() == before["out.jsonl"]
    assert (tmp_path / "out.jsonl.manifest.json.old").read_bytes() == before["out.jsonl.manifest.json"]
    assert cai("sample", "prompts.txt", *words).code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == before["out.jsonl"]
    assert {p.name for p in tmp_path.glob("out.jsonl*")} == set(before)


SCRIPT = ("--model", "scripted:script.jsonl")
PACK = {".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(
        tmp_path / "in.jsonl", ({"id": f"p{i}", "prompt": f"question {i}\u2028", "source": "s"} for i in range(50))
    )
    write_rows(tmp_path / "script.jsonl", [{"contains": "question 7", "replies": [""]}, {"replies": ["one.", "two."]}])
    return tmp_path


@pytest.mark.parametrize("ending", PACK)
def test_compressed_rows_are_the_plain_rows(ending: str, cai: Cai, folder: Path) -> None:
    plain = (folder / "in.jsonl").read_bytes()
    cut = plain.index(b"\n") + 10  # two frames, the border inside a row
    (folder / f"in.jsonl{ending}").write_bytes(PACK[ending](plain[:cut]) + PACK[ending](plain[cut:]))
    assert list(read_values(str(folder / f"in.jsonl{ending}"))) == list(read_values(str(folder / "in.jsonl")))
    for name in ("in.jsonl", f"in.jsonl{ending}"):
        assert cai("sample", name, *SCRIPT, "-o", f"{name}.out").code == 0
    assert (folder / f"in.jsonl{ending}.out").read_bytes() == (folder / "in.jsonl.out").read_bytes()


@pytest.mark.parametrize("ending", PACK)
def test_a_compressed_file_that_was_cut_is_an_error_and_not_fewer_rows(ending: str, cai: Cai, folder: Path) -> None:
    whole = PACK[ending](os.urandom(3000).hex().encode() + b"\n" + (folder / "in.jsonl").read_bytes())
    (folder / f"cut.jsonl{ending}").write_bytes(whole[:-30])
    with pytest.raises(CaiError) as error:
        list(read_prompts(str(folder / f"cut.jsonl{ending}")))
    assert error.value.code == "cannot-read"
    refused = cai("sample", f"cut.jsonl{ending}", *SCRIPT, "-o", "out.jsonl", "--skip-invalid")
    assert (refused.code, refused.error) == (1, "cannot-read")
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize("dies_before", [None, "out.jsonl.zst", "out.jsonl.zst.manifest.json"])
def test_a_compressed_output_holds_the_plain_rows_even_after_a_kill_while_it_appears(
    dies_before: str | None, cai: Cai, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cai("sample", "in.jsonl", *SCRIPT, "-o", "plain.jsonl").code == 0
    words = ("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl.zst")
    if dies_before:
        replace = os.replace

        def die(source: Path, target: Path) -> None:
            if Path(target).name == dies_before:
                raise Died
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            with pytest.raises(Died):
                cai(*words)
        monkeypatch.setattr("cai_cli.phase1_supervised.sample.sample", None)  # asking again would call it
    done = cai(*words, "--json")
    assert done.code == 0, done.stderr
    packed = (folder / "out.jsonl.zst").read_bytes()
    assert zstandard.decompress(packed, max_output_size=2**24) == (folder / "plain.jsonl").read_bytes()
    counts = manifest_of(folder / "out.jsonl.zst")["counts"]
    assert counts == manifest_of(folder / "plain.jsonl")["counts"]
    assert (counts["out"], len(rows_in(folder / "out.jsonl.zst.rejected.jsonl"))) == (49, 1)
    left = {p.name for p in folder.glob("out.jsonl.zst*")}
    assert left == {"out.jsonl.zst", "out.jsonl.zst.manifest.json", "out.jsonl.zst.rejected.jsonl"}
    assert "nothing to do" in cai(*words).stderr


def test_an_output_named_gz_is_refused_before_any_request(cai: Cai, folder: Path) -> None:
    refused = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl.gz")
    assert (refused.code, refused.error) == (2, "invalid-option")
    assert not list(folder.glob("out*"))
