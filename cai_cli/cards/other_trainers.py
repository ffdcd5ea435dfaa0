"""Writes rows in the data formats of other RL trainers (`cai export FILE -o DIR --for openrlhf|verl`).

For training past one node, which is more than TRL does. The rewards come from `cai serve-reward`, which gets the
messages of each prompt through the fields written here. The tests check the formats of OpenRLHF 0.11.2 and verl 0.9.1.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from cai_cli.cards import verl_reward
from cai_cli.cards.dataset_card import DatasetStats
from cai_cli.cards.export import REJECTED, row_parser, usable_rows
from cai_cli.data.jsonl import AppendFile, display_name
from cai_cli.data.schema import Preference, Prompt, Row, conversation_id, reject
from cai_cli.runtime.manifest import hash_input

SAME_PROMPT = "the same prompt as an earlier row"
ROWS_PER_WRITE = 1000


def openrlhf_prompt(row: Prompt, _index: int) -> dict[str, Any]:
    """A row of `--data.prompt_dataset`: `label` carries the messages to the reward server."""
    messages = _messages(row)
    return {"prompt": messages, "label": orjson.dumps(messages).decode(), "datasource": row.source or "cai"}


def openrlhf_preference(row: Preference, _index: int) -> dict[str, Any]:
    """A row of the dataset of OpenRLHF's reward model and DPO trainers."""
    chosen, rejected = ([m.model_dump() for m in reply] for reply in (row.chosen, row.rejected))
    return {"prompt": [m.model_dump() for m in row.prompt], "chosen": chosen, "rejected": rejected}


def verl_prompt(row: Prompt | Preference, index: int) -> dict[str, Any]:
    """A row of `data.train_files`: `extra_info` carries the messages to the reward function.

    `ground_truth` is the chosen reply of a preference, and empty for other rows.
    """
    messages = _messages(row)
    truth = row.chosen[0].content if isinstance(row, Preference) else ""
    extra = {"split": "train", "index": index, "id": row.id, "messages": orjson.dumps(messages).decode()}
    return {
        "data_source": row.source or "cai",
        "prompt": messages,
        "ability": getattr(row, "kind", None) or "general",
        "reward_model": {"style": "model", "ground_truth": truth},
        "extra_info": extra,
    }


def _messages(row: Prompt | Preference) -> list[dict[str, str]]:
    return [message.model_dump() for message in row.prompt]


class _Form(NamedTuple):
    """How rows are written for a trainer, and what the README says about their use."""

    make: Callable[[Any, int], dict[str, Any]]
    write: Callable[[Iterator[Mapping[str, Any]], Path], list[str]]
    usage: str


def export_openrlhf(source: str, work: Path) -> dict[str, Any]:
    """Write the preferences of `source`, or its prompts once each, for OpenRLHF into the new directory `work`.

    Returns:
        The summary, as `export`.

    Raises:
        CaiError: As `export`.
    """
    return _export(
        source,
        work,
        _Form(openrlhf_prompt, _write_jsonl, _OPENRLHF_PROMPTS),
        of_pairs=_Form(openrlhf_preference, _write_jsonl, _OPENRLHF_PAIRS),
    )


def export_verl(source: str, work: Path) -> dict[str, Any]:
    """Write the prompts of `source`, once each, and the reward function for verl into the new directory `work`.

    Returns:
        The summary, as `export`.

    Raises:
        CaiError: As `export`.
    """
    summary = _export(source, work, _Form(verl_prompt, _write_parquet, _VERL))
    shutil.copyfile(str(verl_reward.__file__), work / "reward.py")
    return summary


def _export(source: str, work: Path, of_prompts: _Form, *, of_pairs: _Form | None = None) -> dict[str, Any]:
    """Write a row for each preference where they have a form of their own, else for each prompt."""
    file = hash_input(source)
    row_type, parse = row_parser(source)
    (work / "data").mkdir(parents=True)
    stats, rejected = DatasetStats(), AppendFile(work / REJECTED)
    pairs = of_pairs if row_type is Preference else None
    form = pairs or of_prompts
    with closing(rejected):
        usable = usable_rows(source, parse, stats, rejected)
        rows: Iterator[Any] = usable if pairs else _first_of_each_prompt(usable, stats, rejected)
        columns = form.write((form.make(row, index) for index, row in enumerate(rows)), work / "data")
    readme = _README.format(file=Path(display_name(source)).name, sha256=file.sha256, rows=stats.rows, usage=form.usage)
    (work / "README.md").write_text(readme, encoding="utf-8")
    counts = {"rejected": stats.rejected.total(), "rejected_reasons": dict(sorted(stats.rejected.items()))}
    return {"rows": stats.rows, "type": row_type.__name__, "columns": columns, **counts}


def _first_of_each_prompt(rows: Iterable[Row], stats: DatasetStats, rejected: AppendFile) -> Iterator[Row]:
    seen: set[str] = set()
    for row in rows:
        prompt: Any = row
        if (key := conversation_id(prompt.prompt)) in seen:
            stats.rows -= 1
            stats.rejected[SAME_PROMPT] += 1
            rejected.append([reject(row.key, SAME_PROMPT, row)])
        else:
            seen.add(key)
            yield row


def _write_jsonl(rows: Iterator[Mapping[str, Any]], folder: Path) -> list[str]:
    columns: list[str] = []
    with (folder / "train.jsonl").open("wb") as file:
        for row in rows:
            columns = columns or list(row)
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return columns


def _write_parquet(rows: Iterator[Mapping[str, Any]], folder: Path) -> list[str]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    text, message = pa.string(), pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema(
        [
            ("data_source", text),
            ("prompt", pa.list_(message)),
            ("ability", text),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
            ("extra_info", pa.struct([("split", text), ("index", pa.int64()), ("id", text), ("messages", text)])),
        ]
    )
    with ParquetWriter(folder / "train.parquet", schema) as writer:
        while group := list(islice(rows, ROWS_PER_WRITE)):
            writer.write_table(pa.Table.from_pylist(group, schema))
    return list(schema.names)


_README = """\
# {file}

{rows:,} rows from `{file}` (SHA-256 {sha256}), written by `cai export`.

{usage}"""
_SERVE = """\
Rewards, on a machine that the trainer reaches (`--host 0.0.0.0` where it is another one):

```sh
cai serve-reward runs/pm --port 8009
```

"""
_OPENRLHF_PROMPTS = (
    _SERVE
    + """\
OpenRLHF 0.11.2:

```sh
python -m openrlhf.cli.train_ppo_ray --data.prompt_dataset DIR/data/train.jsonl --data.input_key prompt \\
  --data.label_key label --data.apply_chat_template --reward.remote_url http://HOST:8009/get_reward ...
```
"""
)
_OPENRLHF_PAIRS = """\
OpenRLHF 0.11.2, for a reward model (`train_dpo` takes the same options):

```sh
python -m openrlhf.cli.train_rm --data.dataset DIR/data/train.jsonl --data.prompt_key prompt --data.chosen_key chosen \\
  --data.rejected_key rejected --data.apply_chat_template ...
```

OpenRLHF has hard labels only: `p_chosen` is not exported.
"""
_VERL = (
    _SERVE
    + """\
verl 0.9.1:

```sh
python -m verl.trainer.main_ppo data.train_files=DIR/data/train.parquet data.val_files=DIR/data/train.parquet \\
  reward.custom_reward_function.path=DIR/reward.py reward.custom_reward_function.name=compute_score \\
  +reward.custom_reward_function.reward_kwargs.url=http://HOST:8009 ...
```
"""
)
