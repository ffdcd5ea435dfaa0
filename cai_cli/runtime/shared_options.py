"""The options that several stages share, each declared once."""

from dataclasses import fields, replace
from enum import StrEnum
from typing import Any

import orjson

from cai_cli.common.errors import UsageError
from cai_cli.common.yaml import parse_yaml
from cai_cli.data.row_reader import RowReader
from cai_cli.data.sources import Columns
from cai_cli.engines import open_engine
from cai_cli.engines.base import ChatOptions, Engine, Sampling, Server
from cai_cli.engines.choice import with_engine
from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option

DEFAULT_MODEL = "smollm2-135m"
MODEL_HELP = (
    "Directory, Hub name or alias (see `cai models list`), or BASE+ADAPTER for a LoRA adapter, run by vLLM on "
    "CUDA where it is installed; or openai:NAME with --base-url, vllm:NAME, local:NAME or scripted:FILE."
)
MODEL_TO_TRAIN_HELP = "Model to train: directory, Hub name or alias (see `cai models list`), or BASE+ADAPTER."


class Device(StrEnum):
    """Where torch runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """The precision of a model's weights; auto is float32 on a CPU, bfloat16 on a GPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class EngineDType(StrEnum):
    """The precision of the weights of a model that answers; a model in training has no int8."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class FormatChoice(StrEnum):
    """How a prompt is written; auto takes the chat template where the model has one."""

    AUTO = "auto"
    CHAT = "chat"
    RAW = "raw"


class Thinking(StrEnum):
    """Whether a reasoning model thinks; auto leaves it to the model."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class InputOptions(StageConfig):
    """Which rows are read."""

    input: str = option(
        ...,
        "File of rows (JSONL, JSON, CSV, TSV, parquet), hf://datasets/OWNER/NAME?config=C&split=S, or - for stdin.",
        Option(Effect.HASHED, Group.INPUT, metavar="INPUT", reads_file=True, argument=True),
    )
    limit: int | None = option(None, "Read only the first N rows of the input.", Option(group=Group.INPUT), ge=1)


class RowInputOptions(InputOptions):
    """Which rows are read, and what happens to invalid lines."""

    skip_invalid: bool = option(
        False,
        "Skip invalid lines; they are written to OUT.rejected.jsonl.",
        Option(Effect.HARMLESS, Group.INPUT, aliases=("skip-bad",)),
    )
    max_invalid: int | None = option(
        None,
        "Stop after more than N invalid lines, with --skip-invalid.",
        Option(Effect.HARMLESS, Group.INPUT, aliases=("max-bad",)),
        ge=0,
    )

    column: str | None = option(
        None,
        "Column that holds the prompt, or PART=NAME,PART=NAME for prompt, completion, messages, chosen, rejected, id.",
        Option(group=Group.INPUT, metavar="NAME"),
    )

    def columns(self) -> Columns | None:
        """Which columns hold what. Raises UsageError."""
        return Columns.parse(self.column) if self.column else None

    def row_reader(self, *, of_input: bool = True) -> RowReader:
        """A reader of the input's rows, or of those of another file, to which `--column` does not apply.

        Raises UsageError.
        """
        columns = self.columns() if of_input else None
        return RowReader(skip_invalid=self.skip_invalid, max_invalid=self.max_invalid, columns=columns)


class ShardOptions(RowInputOptions):
    """Input options of a stage that can run on a part of its input."""

    shard: str | None = option(
        None,
        "Process only the Ith of N parts of the input, split by prompt id (see `cai merge`).",
        Option(group=Group.INPUT, metavar="I/N"),
    )

    def row_reader(self, *, of_input: bool = True) -> RowReader:
        columns = self.columns() if of_input else None
        return RowReader(self.shard, skip_invalid=self.skip_invalid, max_invalid=self.max_invalid, columns=columns)


class RunOptions(StageConfig):
    """How a run treats an existing output, and what it prints."""

    overwrite: bool = option(
        False, "Start from scratch and replace the existing output.", Option(Effect.HARMLESS, Group.OUTPUT)
    )
    as_json: bool = option(
        False, "Print the summary as one JSON object.", Option(Effect.HARMLESS, Group.OUTPUT, flags=("--json",))
    )
    quiet: bool = option(
        False,
        "Print only errors and warnings.",
        Option(Effect.HARMLESS, Group.OUTPUT, flags=("--quiet", "-q")),
    )


class OutputOptions(RunOptions):
    """Where rows are written."""

    output: str = option(
        "-",
        "Output JSONL file, or - for stdout.",
        Option(Effect.HARMLESS, Group.OUTPUT, flags=("--output", "-o")),
    )


class DeviceOptions(StageConfig):
    """Where a local model runs."""

    batch_size: int | None = option(
        None,
        "Rows handed to the model at once; by default fitted to the device.",
        Option(Effect.HARMLESS, Group.MODEL),
        ge=1,
    )
    device: Device = option(Device.AUTO, "Device of a local model.", Option(Effect.HARMLESS, Group.MODEL))


_SERVER = Option(Effect.HARMLESS, Group.SERVER)


class RequestOptions(DeviceOptions):
    """How requests to a model are run: on which device, or by which server."""

    dtype: EngineDType = option(
        EngineDType.AUTO,
        "Precision of the weights; auto is float32 on a CPU, bfloat16 on a GPU. int8 is for CPUs, float16 for vLLM.",
        Option(group=Group.MODEL),
    )
    base_url: list[str] | None = option(
        None,
        "Address of the OpenAI-compatible server, as http://HOST:PORT/v1; repeat it for several servers of the same "
        "model. The key is read from OPENAI_API_KEY.",
        Option(Effect.HARMLESS, Group.SERVER, metavar="URL"),
    )
    concurrency: int | None = option(None, "Requests in flight at once; by default 16.", _SERVER, ge=1, le=1000)
    timeout: float | None = option(None, "Seconds for one request, retries included; by default 600.", _SERVER, ge=0.1)
    budget_tokens: int | None = option(
        None, "Stop when this output has used this many tokens; a larger budget resumes it.", _SERVER, ge=1
    )
    price_in: float | None = option(None, "Price of a million prompt tokens, to report the cost.", _SERVER, ge=0.0)
    price_out: float | None = option(None, "Price of a million new tokens, to report the cost.", _SERVER, ge=0.0)
    served_as: str | None = option(
        None,
        "Name of the model in the server's answers, where it differs from the name in --model (an Azure deployment, an "
        "alias).",
        Option(Effect.HARMLESS, Group.SERVER, metavar="NAME"),
    )

    engine_arg: list[str] | None = option(
        None,
        "Setting of vLLM, for models that it runs, such as tensor_parallel_size=8; can be repeated.",
        Option(Effect.HARMLESS, Group.MODEL, metavar="NAME=VALUE"),
    )
    # An engine's identity records these two where they are given.
    thinking: Thinking = option(
        Thinking.AUTO,
        "Whether a reasoning model thinks before it answers; auto leaves it to the chat template. `cai doctor --model "
        "NAME` tells whether it can be switched. Thoughts are stored apart from replies.",
        Option(Effect.HASHED, Group.MODEL),
    )
    template_arg: list[str] | None = option(
        None,
        "Argument of the model's chat template, such as reasoning_effort=low; can be repeated.",
        Option(Effect.HASHED, Group.MODEL, metavar="NAME=VALUE"),
    )

    def check(self) -> None:
        super().check()
        named_values(self.template_arg, "--template-arg")
        named_values(self.engine_arg)

    def chat_options(self) -> ChatOptions:
        """How chats are rendered. Raises UsageError."""
        return ChatOptions(self.thinking.value, named_values(self.template_arg, "--template-arg"))

    def open_engine(self, model: str) -> Engine:
        """The engine of `model`. Raises UsageError where it lacks one of these options."""
        chosen = with_engine(model, self.device.value)
        device = "auto" if chosen != model and chosen.startswith("vllm:") else self.device.value
        server = Server(**{field.name: getattr(self, field.name) for field in fields(Server)})
        return open_engine(
            chosen,
            batch_size=self.batch_size,
            device=device,
            dtype=self.dtype.value,
            server=server,
            engine_args=named_values(self.engine_arg),
            chat=self.chat_options(),
        )


def named_values(given: list[str] | None, flag: str = "--engine-arg") -> dict[str, Any]:
    """The values of a repeated NAME=VALUE option by name. Raises UsageError."""
    return dict(_named_value(text, flag) for text in given or ())


def _named_value(text: str, flag: str) -> tuple[str, Any]:
    """The name and the value, read as YAML, of a NAME=VALUE. Raises UsageError, CaiError."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"{flag} {text}: not NAME=VALUE", code="invalid-option")
    parsed = parse_yaml(value, f"{flag} {name}")
    if not _is_plain(parsed):  # a manifest could not record it, so the run could not be resumed
        raise UsageError(
            f"{flag} {text}: dates, sets, NaN, infinite or huge numbers and keys that are not text cannot be recorded",
            hint="quote it where it is text: NAME='\"VALUE\"'",
            code="invalid-option",
        )
    return name, parsed


def _is_plain(value: Any) -> bool:
    """Whether a value is the same after it was written as JSON and read again."""
    try:
        return bool(orjson.loads(orjson.dumps(value)) == value)
    except (TypeError, ValueError):  # orjson's errors are both
        return False


CHAT_TEMPLATE_HELP = "File of a chat template (Jinja) that replaces that of the model, or gives a base model one."


class ChatTemplateOptions(StageConfig):
    """The chat template of the model."""

    chat_template: str | None = option(
        None, CHAT_TEMPLATE_HELP, Option(Effect.HASHED, Group.MODEL, metavar="FILE", reads_file=True)
    )


class EngineOptions(RequestOptions, ChatTemplateOptions):
    """The model that a stage sends requests to."""

    model: str = option(DEFAULT_MODEL, MODEL_HELP, Option(Effect.HASHED, Group.MODEL, flags=("--model", "-m")))

    def chat_options(self) -> ChatOptions:
        return replace(super().chat_options(), template=self.chat_template)


class SeedOptions(StageConfig):
    """The random seed."""

    seed: int = option(
        0,
        "Random seed; each row's randomness derives from the seed, the stage and the row id.",
        Option(group=Group.SAMPLING),
        ge=0,
        le=2**32 - 1,
    )


class FormatOptions(StageConfig):
    """How prompts are written."""

    prompt_format: FormatChoice = option(
        FormatChoice.AUTO,
        "Chat template, or raw text for base models; auto uses the chat template where the model has one.",
        Option(group=Group.SAMPLING, aliases=("prompt-form",)),
    )


class SamplingOptions(FormatOptions, SeedOptions):
    """How replies are sampled."""

    max_new_tokens: int = option(256, "Longest reply, in tokens.", Option(group=Group.SAMPLING), ge=1)
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.", Option(group=Group.SAMPLING), ge=0.0)
    top_p: float = option(
        1.0, "Nucleus sampling; 1 keeps the whole distribution.", Option(group=Group.SAMPLING), ge=0.0, le=1.0
    )

    def sampling(self) -> Sampling:
        """These options as an engine takes them."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)
