"""Compressed inputs and outputs hold the same rows as plain ones, are read as a stream, and are whole or an error."""

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from conftest import Cai
from helpers import Died, manifest_of, rows_in, write_rows

from cai_cli.common.errors import CaiError
from cai_cli.data.jsonl import read_prompts, read_values

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
    assert refused.code == 1
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize("ending", PACK)
def test_an_ending_that_promises_compression_must_hold_it(ending: str, folder: Path) -> None:
    path = folder / f"plain.jsonl{ending}"
    path.write_bytes((folder / "in.jsonl").read_bytes())
    with pytest.raises(CaiError) as error:
        list(read_values(str(path)))
    assert error.value.code == "cannot-read"


def test_a_compressed_file_is_never_held_whole(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "in.jsonl.zst"
    line = json.dumps({"prompt": "q" * 1000}).encode() + b"\n"
    path.write_bytes(zstandard.compress(line * 20_000))
    next(read_values(str(path)))  # imports are not what is measured
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_values(str(path))) == 20_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 500_000


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


def test_shards_may_be_compressed_and_merge_into_the_compressed_whole(cai: Cai, folder: Path) -> None:
    assert cai("sample", "in.jsonl", *SCRIPT, "-o", "whole.jsonl.zst").code == 0
    names = [f"s{i}.jsonl.zst" for i in (1, 2)]
    for i, name in enumerate(names, 1):
        assert cai("sample", "in.jsonl", *SCRIPT, "--shard", f"{i}/2", "-o", name).code == 0
    assert cai("merge", *names, "-o", "merged.jsonl.zst").code == 0
    assert (folder / "merged.jsonl.zst").read_bytes() == (folder / "whole.jsonl.zst").read_bytes()


def test_an_output_named_gz_is_refused_before_anything_is_asked(cai: Cai, folder: Path) -> None:
    refused = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl.gz")
    assert (refused.code, ".zst only" in refused.stderr) == (2, True)
    assert not list(folder.glob("out*"))
