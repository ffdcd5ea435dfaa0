"""The requests of a batch and their answers, in one SQLite file: what was written is there after a kill, and neither
requests nor answers are in memory."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_atomically
from cai_cli.engines.base import Usage
from cai_cli.engines.batch.forms import Form
from cai_cli.engines.openai_failures import Refused
from cai_cli.engines.openai_response import ServerResponse

_TABLES = """
CREATE TABLE IF NOT EXISTS requests(
    number INTEGER PRIMARY KEY, id TEXT UNIQUE, line BLOB, characters INTEGER, max_tokens INTEGER, run INTEGER,
    file TEXT);
CREATE INDEX IF NOT EXISTS by_run ON requests(run, file);
CREATE TABLE IF NOT EXISTS answers(id TEXT PRIMARY KEY, response BLOB, refusal TEXT);
CREATE TABLE IF NOT EXISTS used(model TEXT PRIMARY KEY, requests INTEGER, prompt_tokens INTEGER, new_tokens INTEGER);
CREATE TABLE IF NOT EXISTS facts(name TEXT PRIMARY KEY, value TEXT);
"""


@dataclass(frozen=True)
class Missing:
    """The requests of a run that have no answer.

    Attributes:
        requests: How many there are.
        waiting: How many of them are in request files already, whose results are not read yet.
        characters: The length of the prompts of the others.
        max_tokens: The most tokens that the answers to those may have.
    """

    requests: int
    waiting: int
    characters: int
    max_tokens: int


class Store:
    """The requests of one batch folder and their answers.

    A request belongs to the run that last asked for it, so that those of an abandoned run are not written again.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or create it. Raises CaiError `cannot-write`."""
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript(_TABLES)
        except sqlite3.Error as error:
            raise CaiError(f"cannot write {path}: {error}", code="cannot-write") from error
        self.run = int(self._fact("run") or 0)

    def _fact(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else None

    def _set_fact(self, name: str, value: object) -> None:
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, str(value)))

    def begin(self) -> None:
        """Start a transaction: until `commit`, a kill leaves the file as it was."""
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Keep what was written since `begin`."""
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Discard what was not committed, and close the file."""
        self._db.close()

    # --- one run of a stage -------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        """Start a transaction for a run of a stage, whose missing requests are counted apart from earlier ones."""
        self.begin()
        self.run += 1
        self._set_fact("run", self.run)

    def answer(self, id: str) -> ServerResponse | Refused | None:
        """The answer to a request, the provider's refusal, or None where there is neither."""
        row = self._db.execute("SELECT response, refusal FROM answers WHERE id = ?", (id,)).fetchone()
        if row is None:
            return None
        return Refused(row[1], row[1]) if row[0] is None else ServerResponse.model_validate_json(row[0])

    def ask(self, id: str, line: dict[str, Any], characters: int, max_tokens: int) -> None:
        """Record a request without an answer; one that was written to a file already stays there."""
        self._db.execute(
            "INSERT INTO requests(id, line, characters, max_tokens, run) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT(id) DO UPDATE SET run = excluded.run, "
            "line = CASE WHEN file IS NULL THEN excluded.line ELSE line END",
            (id, orjson.dumps(line), characters, max_tokens, self.run),
        )

    def missing(self) -> Missing:
        """The requests of the last run that have no answer."""
        row = self._db.execute(
            "SELECT count(*), count(file), coalesce(sum(iif(file IS NULL, characters, 0)), 0), "
            "coalesce(sum(iif(file IS NULL, max_tokens, 0)), 0) FROM requests WHERE run = ?",
            (self.run,),
        ).fetchone()
        return Missing(*row)

    # --- request files ------------------------------------------------------------------------------------------

    def write_files(self, folder: Path, form: Form) -> list[tuple[Path, int]]:
        """Write the missing requests of the last run that are in no file yet.

        Returns:
            The new files, each with the number of its requests.
        """
        files, number = [], int(self._fact("files") or 0)
        while self.missing().requests > self.missing().waiting:
            number += 1
            path = folder / f"requests-{number}.{form.ending}"
            written: list[int] = []
            write_atomically(path, self._blocks(form, written))
            self.begin()
            self._db.execute(
                "UPDATE requests SET file = ? WHERE run = ? AND file IS NULL AND number <= ?",
                (path.name, self.run, written[-1]),
            )
            self._set_fact("files", number)
            self.commit()
            files.append((path, len(written)))
        return files

    def _blocks(self, form: Form, written: list[int]) -> Iterator[bytes]:
        """The content of one request file. `written` receives the numbers of its requests."""
        before, after = form.head
        size = len(before) + len(after)
        yield before
        rows = self._db.execute(
            "SELECT number, line FROM requests WHERE run = ? AND file IS NULL ORDER BY number", (self.run,)
        )
        for number, line in rows:
            size += len(line) + len(form.separator)
            if written and (len(written) == form.most_requests or size > form.most_bytes):
                break
            yield form.separator + line if written else line
            written.append(number)
        yield after

    def waiting_files(self) -> list[str]:
        """The request files that hold missing requests of the last run."""
        rows = self._db.execute(
            "SELECT file, min(number) FROM requests WHERE run = ? AND file IS NOT NULL GROUP BY file ORDER BY 2",
            (self.run,),
        )
        return [name for name, _ in rows]

    def write_again(self) -> None:
        """Let every request without an answer be written to a new file."""
        self._db.execute("UPDATE requests SET file = NULL")

    # --- results ------------------------------------------------------------------------------------------------

    def line_of(self, id: str) -> dict[str, Any] | None:
        """The request with this id as it was written; None where it has an answer or is of another batch."""
        row = self._db.execute("SELECT line FROM requests WHERE id = ?", (id,)).fetchone()
        return orjson.loads(row[0]) if row else None

    def is_answered(self, id: str) -> bool:
        """Whether the request with this id has an answer, or was refused for good."""
        return self._db.execute("SELECT 1 FROM answers WHERE id = ?", (id,)).fetchone() is not None

    @property
    def has_answers(self) -> bool:
        """Whether any request was answered."""
        return self._db.execute("SELECT 1 FROM used").fetchone() is not None

    def add_answer(self, id: str, outcome: ServerResponse | Refused, model: str) -> None:
        """Keep the answer to a request for `model`, and count what it used."""
        if isinstance(outcome, Refused):
            self._db.execute("INSERT INTO answers VALUES (?, NULL, ?)", (id, outcome.message))
        else:
            response = outcome.model_dump_json(exclude_defaults=True)
            self._db.execute("INSERT INTO answers VALUES (?, ?, NULL)", (id, response))
            tokens = outcome.tokens
            self._db.execute(
                "INSERT INTO used VALUES (?, 1, ?, ?) ON CONFLICT(model) DO UPDATE SET requests = requests + 1, "
                "prompt_tokens = prompt_tokens + excluded.prompt_tokens, new_tokens = new_tokens + excluded.new_tokens",
                (outcome.model or model, tokens.prompt_tokens, tokens.completion_tokens),
            )
        self._db.execute("DELETE FROM requests WHERE id = ?", (id,))

    def ask_again(self, id: str) -> None:
        """Let a request be written to another file."""
        self._db.execute("UPDATE requests SET file = NULL WHERE id = ?", (id,))

    def count_usage(self, usage: Usage) -> None:
        """Set `usage` to what all answers of this folder have used."""
        rows = self._db.execute("SELECT * FROM used ORDER BY rowid").fetchall()
        usage.models = [str(row[0]) for row in rows]
        usage.requests, usage.prompt_tokens, usage.new_tokens = (sum(row[n] for row in rows) for n in (1, 2, 3))

    @property
    def changed_parameters(self) -> dict[str, str | None]:
        """The parameters that the provider refuses, each with its other name, or None where it is left out."""
        recorded: dict[str, str | None] = orjson.loads(self._fact("changed_parameters") or "{}")
        return recorded

    def change_parameters(self, changes: dict[str, str | None]) -> None:
        """Record the parameters that the provider refuses."""
        self._set_fact("changed_parameters", orjson.dumps(changes).decode())
