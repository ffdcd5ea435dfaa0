"""Invalid lines in real files: by default the run stops at the first with its file and line and a way out;
with --skip-invalid each is kept in the rejected file and counted, within --max-invalid and within bounded memory."""

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import Cai
from helpers import Json, manifest_of, rows_in, sample_row, write_rows
from tiny import tiny_model_dir

SCRIPT = ("--model", "scripted:script.jsonl")
GOOD = b'{"id": "a", "prompt": "fine"}'
BAD = {
    "invalid UTF-8": (b'{"prompt": "caf\xe9"}', "not JSON: 'utf-8' codec can't decode byte 0xe9"),
    "a NUL byte": (b'{"prompt": "a\x00b"}', "not JSON: unexpected control character in string at character"),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', "not JSON: no low surrogate in string at character 13"),
    "a surrogate in bytes": (b'{"prompt": "\xed\xa0\x80"}', "not JSON: 'utf-8' codec can't decode byte 0xed"),
    "NaN": (b'{"prompt": NaN}', "not JSON"),
    "Infinity": (b'{"prompt": "q", "id": -Infinity}', "not JSON"),
    "a key twice": (b'{"id": "x", "prompt": "q", "prompt": "r"}', "field 'prompt' occurs twice"),
    "a key twice, spaced": (b'{"id" :"x", "prompt"\t: "q:", "id" : "y"}', "field 'id' occurs twice"),
    "a key twice, escaped": (b'{"prompt": "q", "pr\\u006fmpt": "r"}', "field 'prompt' occurs twice"),
    "a key twice, deep": (b'{"prompt": [{"role": "user", "content": "a", "role": "user"}]}', "'role' occurs twice"),
    "a wrong type": (b'{"prompt": 3}', "must be text"),
    "an id of a wrong type": (b'{"id": 1.5, "prompt": "q"}', "field 'id'"),
    "a missing field": (b'{"id": "x"}', "no prompt in this row"),
    "no object": (b"[1, 2]", "must be a JSON object"),
    "cut off": (b'{"prompt": "q', "not JSON: unexpected end of data"),
    "two in one line": (GOOD + GOOD, "not JSON"),
    "a carriage return alone": (b'{"prompt": "q\rr"}', "not JSON: unexpected control character in string at character"),
    "200k nesting": (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not JSON: depth limit exceeded"),
    "a 5,000-digit integer": (b'{"prompt": "q", "id": ' + b"7" * 5_000 + b"}", "not JSON: number is infinity"),
    "an integer past 64 bits": (b'{"prompt": "q", "id": 18446744073709551616}', "field 'id'"),
    "an empty prompt": (b'{"prompt": " "}', "the prompt is empty"),
}
FINE = {
    "a column that is not read": (b'{"prompt": "q", "promt": "r"}', "q"),
    "U+2028 in content": ('{"prompt": "a\u2028b"}'.encode(), "a\u2028b"),
    "NEL, form feed escaped and a NUL escaped": (b'{"prompt": "a\xc2\x85b\\f\\u0000"}', "a\x85b\f\x00"),
    "an escaped surrogate pair": (b'{"prompt": "\\ud83d\\ude00"}', "\U0001f600"),
    "text that looks like keys": (b'{"prompt": "{\\"a\\": 1, \\"a\\": 2}"}', '{"a": 1, "a": 2}'),
    "a carriage return before the newline": (b'{"prompt": "q"}\r', "q"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "script.jsonl", [{"replies": ["one.", "two."], "scores": [-0.1, -3.0]}])
    return tmp_path


def write_prompts(folder: Path, *lines: bytes) -> None:
    (folder / "in.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("what", BAD)
def test_an_invalid_line_stops_the_run_or_is_kept_unchanged_with_skip_invalid(
    what: str, cai: Cai, folder: Path
) -> None:
    line, reason = BAD[what]
    write_prompts(folder, GOOD, line, b'{"id": "b", "prompt": "fine too"}')
    stopped = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl", "--batch-size", "1")
    assert (stopped.code, stopped.error) == (1, "invalid-row")
    assert stopped.stderr.startswith("error: in.jsonl:2: ")
    assert reason in stopped.stderr
    assert "--skip-invalid" in stopped.stderr.splitlines()[1]
    assert len(stopped.stderr.splitlines()) == 2

    done = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl", "--skip-invalid", "--json")
    assert done.code == 0, done.stderr
    assert [row["id"] for row in rows_in(folder / "out.jsonl")] == ["a", "b"]
    (kept,) = rows_in(folder / "out.jsonl.rejected.jsonl")
    assert kept["key"] == "line 2"
    assert kept["reason"].startswith("bad line: in.jsonl:2: ")
    assert reason in kept["reason"]
    assert line in (kept["row"].encode("utf-8"), kept["row"].encode("latin-1", "replace"))
    counts = manifest_of(folder / "out.jsonl")["counts"]
    assert (counts["in"], counts["out"], counts["rejected_reasons"]) == (3, 2, {"bad line": 1})


@pytest.mark.parametrize("what", FINE)
def test_what_only_looks_strange_is_content(what: str, cai: Cai, folder: Path) -> None:
    line, content = FINE[what]
    write_prompts(folder, line)
    assert cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl").code == 0
    assert rows_in(folder / "out.jsonl")[0]["prompt"][0]["content"] == content


def test_a_byte_order_mark_and_other_line_ends_change_no_row(cai: Cai, folder: Path) -> None:
    lines = [b'{"prompt": "one"}', b'{"prompt": "two"}']
    write_prompts(folder, *lines)
    (folder / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))
    for name in ("in", "marked"):
        assert cai("sample", f"{name}.jsonl", *SCRIPT, "-o", f"{name}.out").code == 0
    plain, marked = ((folder / f"{name}.out").read_bytes() for name in ("in", "marked"))
    assert marked == plain.replace(b'"in.jsonl"', b'"marked.jsonl"')


@pytest.mark.parametrize("stage", ["sample", "critique", "critique-revise", "label-prefs"])
def test_invalid_lines_are_kept_in_their_order_in_every_stage(stage: str, cai: Cai, folder: Path) -> None:
    rows = [json.dumps(sample_row(i, k)) for i in range(4) for k in range(2)]
    lines = ["{", *rows[:3], "[]", *rows[3:], '{"id": 3}']
    (folder / "in.jsonl").write_text("\n".join(lines))
    words = (stage, "in.jsonl", *SCRIPT, "--skip-invalid", "-o", "out.jsonl")
    if stage == "sample":  # samples as prompts again, of which the second is the same prompt
        lines = [line for i, line in enumerate(lines) if i not in (2, 5, 7, 9)]
        (folder / "in.jsonl").write_text("\n".join(lines))
    if stage == "label-prefs":
        words = (*words, "--one-order")
    for size in ("1", "3"):
        done = cai(*words, "--batch-size", size, "--overwrite")
        assert done.code == 0, done.stderr
        rejected = rows_in(folder / "out.jsonl.rejected.jsonl")
        bad = [row["row"] for row in rejected]
        assert bad == ["{", "[]", '{"id": 3}']
        assert [row["key"] for row in rejected] == [f"line {lines.index(text) + 1}" for text in bad]
        counts = manifest_of(folder / "out.jsonl")["counts"]
        assert counts["in"] == counts["out"] + counts["rejected"] + counts["skipped"]


def test_a_run_that_stopped_at_an_invalid_line_resumes_past_it_and_requests_nothing_twice(
    cai: Cai, folder: Path
) -> None:
    lines = [json.dumps({"id": f"p{i}", "prompt": f"q{i}"}).encode() for i in range(6)]
    write_prompts(folder, *lines[:4], b"{", *lines[4:])
    words = ("sample", "in.jsonl", *SCRIPT, "--batch-size", "2")
    assert cai(*words, "--skip-invalid", "-o", "calm.jsonl").code == 0
    assert cai(*words, "-o", "out.jsonl").code == 1
    again = cai(*words, "--skip-invalid", "-o", "out.jsonl")
    assert again.code == 0
    assert "4 rows are finished" in again.stderr
    for side in ("", ".rejected.jsonl"):
        assert (folder / f"out.jsonl{side}").read_bytes() == (folder / f"calm.jsonl{side}").read_bytes()


def test_max_invalid_bounds_the_number_of_invalid_lines(cai: Cai, folder: Path) -> None:
    write_prompts(folder, GOOD, b"{", b"[", b"3")
    words = ("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl", "--skip-invalid")
    stopped = cai(*words, "--max-invalid", "2")
    assert (stopped.code, stopped.error) == (1, "invalid-row")
    assert "in.jsonl:4: " in stopped.stderr
    assert not (folder / "out.jsonl").exists()
    assert cai(*words, "--max-invalid", "3").code == 0
    assert manifest_of(folder / "out.jsonl")["counts"]["rejected_reasons"] == {"bad line": 3}
    usage = cai("sample", "in.jsonl", *SCRIPT, "--max-invalid", "3")
    assert (usage.code, usage.error) == (2, "option-conflict")


def test_with_rows_on_stdout_an_invalid_line_is_shown_whole_on_stderr(cai: Cai, folder: Path) -> None:
    write_prompts(folder, GOOD, b'{"prompt": \x1b[2J}')
    done = cai("sample", "in.jsonl", *SCRIPT, "--skip-invalid")
    assert (done.code, len(done.stdout.splitlines())) == (0, 1)
    assert "rejected: " in done.stderr
    assert "\x1b" not in done.stderr


def test_training_rejects_invalid_lines_into_the_file_and_the_count(cai: Cai, folder: Path) -> None:
    tiny_model_dir(folder / "base")
    rows = [json.dumps(sample_row(i)) for i in range(3)]
    (folder / "rows.jsonl").write_text("\n".join([rows[0], "{", *rows[1:]]))
    words = ("sft", "rows.jsonl", "-o", "sl", "--model", "base", "--max-steps", "1", "--device", "cpu")
    stopped = cai(*words)
    assert (stopped.code, stopped.error) == (1, "invalid-row")
    done = cai(*words, "--skip-invalid", "--json")
    assert done.code == 0, done.stderr
    counts = json.loads(done.stdout)
    assert (counts["in"], counts["used"], counts["rejected_reasons"]) == (4, 3, {"bad line": 1})
    assert rows_in(folder / "sl.rejected.jsonl")[0]["row"] == "{"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b'{"prompt": "q"}\n'), "is gzip data, not JSON lines"),
        (b"\x28\xb5\x2f\xfd....", "is zstd data, not JSON lines"),
        (None, "is a directory, not a JSONL file"),
    ],
    ids=["gzip by mistake", "zstd by mistake", "a directory"],
)
def test_a_file_of_another_kind_is_one_line_of_error_even_with_skip_invalid(
    content: bytes | None, message: str, cai: Cai, folder: Path
) -> None:
    if content is None:
        (folder / "in.jsonl").mkdir()
    else:
        (folder / "in.jsonl").write_bytes(content)
    refused = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl", "--skip-invalid")
    assert refused.code == 1
    assert message in refused.stderr or "Is a directory" in refused.stderr
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) <= 2
    assert not (folder / "out.jsonl").exists()


def test_an_empty_file_is_an_empty_output(cai: Cai, folder: Path) -> None:
    write_prompts(folder)
    done = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl", "--skip-invalid")
    assert (done.code, (folder / "out.jsonl").read_bytes()) == (0, b"")


def peak_mib(*words: str, cwd: Path, feed: "threading.Thread | None" = None, stdin: int | None = None) -> int:
    """Peak resident memory of a `cai` process in MiB; raises when it fails."""
    code = "import resource, atexit, sys; from cai_cli.cli.app import main; atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)); main()"
    child = subprocess.Popen([sys.executable, "-c", code, *words], cwd=cwd, stdin=stdin, stderr=subprocess.PIPE)
    if feed:
        feed.start()
    _, stderr = child.communicate(timeout=240)
    assert child.returncode == 0, stderr
    return int(stderr.split()[-1]) // 1024


@pytest.mark.slow
@pytest.mark.parametrize("through", ["a file", "a pipe"])
def test_a_line_of_one_gibibyte_is_passed_over_in_bounded_memory(through: str, folder: Path) -> None:
    words = ("sample", *SCRIPT, "-o", "out.jsonl", "--skip-invalid", "-q")
    write_prompts(folder, GOOD)
    usual = peak_mib(*words, "in.jsonl", "--overwrite", cwd=folder)
    if through == "a file":
        with (folder / "in.jsonl").open("wb") as file:
            file.write(GOOD + b"\n" + b'{"prompt": "')
            file.seek(2**30, os.SEEK_CUR)  # a hole: NULs that take no room on disk
            file.write(b'"}\n' + GOOD.replace(b"a", b"b", 1).replace(b'"a"', b'"b"') + b"\n")
        peak = peak_mib(*words, "in.jsonl", "--overwrite", cwd=folder)
    else:
        read, write = os.pipe()

        def feed() -> None:
            with os.fdopen(write, "wb") as pipe:
                pipe.write(GOOD + b"\n")
                for _ in range(1024):
                    pipe.write(b"x" * 2**20)
                pipe.write(b"\n" + GOOD.replace(b'"a"', b'"b"') + b"\n")

        peak = peak_mib(*words, "-", "--overwrite", cwd=folder, feed=threading.Thread(target=feed), stdin=read)
        os.close(read)
    (kept,) = rows_in(folder / "out.jsonl.rejected.jsonl")
    assert "a line longer than 64 MiB (its first 4,096 bytes are kept)" in kept["reason"]
    assert len(kept["row"]) == 4096
    assert [row["id"] for row in rows_in(folder / "out.jsonl")] == ["a", "b"]
    assert peak < usual + 200


def test_endless_invalid_lines_do_not_fill_the_memory(cai: Cai, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_cli.data.row_reader.MAX_LINE_BYTES", 2**20)
    write_prompts(folder, GOOD, *([b"x" * 1000] * 2000))
    stopped = cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl", "--skip-invalid")
    assert (stopped.code, stopped.error) == (1, "invalid-row")


def test_the_limit_counts_rows_and_not_invalid_lines(cai: Cai, folder: Path) -> None:
    rows: list[Json] = [{"id": f"p{i}", "prompt": "q"} for i in range(4)]
    lines = [json.dumps(row).encode() for row in rows]
    write_prompts(folder, lines[0], b"{", *lines[1:])
    assert cai("sample", "in.jsonl", *SCRIPT, "-o", "out.jsonl", "--skip-invalid", "--limit", "2").code == 0
    assert manifest_of(folder / "out.jsonl")["counts"]["in"] == 3


READERS = {
    "sort": ("sort", "in.jsonl", "-o", "out.jsonl"),
    "dedup": ("dedup", "in.jsonl", "-o", "out.jsonl"),
    "show": ("show", "in.jsonl"),
    "stats": ("stats", "in.jsonl"),
    "export": ("export", "in.jsonl", "-o", "out"),
    "critique": ("critique", "in.jsonl", *SCRIPT, "-o", "out.jsonl"),
    "label-prefs": ("label-prefs", "in.jsonl", *SCRIPT, "-o", "out.jsonl"),
    "eval agreement": ("eval", "agreement", "in.jsonl"),
}


@pytest.mark.faults
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_rows_names_the_line_of_an_invalid_row(reader: str, what: str, cai: Cai, folder: Path) -> None:
    line, _ = BAD[what]
    write_prompts(folder, json.dumps(sample_row(0)).encode(), line)
    done = cai(*READERS[reader])  # anything but an error of ours would come out of here as a traceback
    said = done.stderr + done.stdout
    if done.code == 0:  # a reader that needs no more of a row than what it shows
        assert reader in ("sort", "dedup", "show", "stats"), said
        return
    assert done.code == 1
    assert "in.jsonl:" in done.stderr
    assert not (folder / "out.jsonl").exists()
