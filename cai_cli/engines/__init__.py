"""Model backends. `open_engine` opens the engine for a model name. Engines do not depend on stages."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cai_cli.common.errors import UsageError
from cai_cli.engines import batch
from cai_cli.engines.base import ChatOptions, Engine, Server


def open_engine(
    model: str,
    *,
    batch_size: int | None,
    device: str,
    dtype: str,
    server: Server | None = None,
    engine_args: Mapping[str, Any] | None = None,
    chat: ChatOptions | None = None,
) -> Engine:
    """The engine for a model name. Nothing heavy is loaded before the first request.

    Args:
        model: `openai:NAME` on a server, `vllm:NAME`, `scripted:FILE`, or a directory, alias or Hub name, with or
            without `local:`, for the local torch engine.
        batch_size: Rows at once; None takes the default for the engine and its device.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16"; "float16" for vLLM, "int8" for the local engine on a CPU.
        server: The options of the server, for `openai:` models only.
        engine_args: Settings of vLLM, for `vllm:` models only.
        chat: How chats are rendered. A server takes no template, and a script none of it.

    Raises:
        UsageError: An option that this engine does not have (`option-conflict`), or an invalid value.

    In `cai batch` the batch opens the engine.
    """
    server, chat = server or Server(), chat or ChatOptions()
    if session := batch.active.get():
        return session.open(model, server, chat)
    _refuse_other_options(model, server, engine_args, chat)
    _refuse_other_values(model, batch_size, device, dtype)
    if model.startswith("openai:"):
        from cai_cli.engines.openai import OpenAIEngine

        return OpenAIEngine(model.removeprefix("openai:"), server, chat)
    if model.startswith("scripted:"):
        from cai_cli.engines.scripted import ScriptedEngine

        return ScriptedEngine(model.removeprefix("scripted:"), batch_size or 64)
    if model.startswith("vllm:"):
        from cai_cli.engines.vllm import VllmEngine

        return VllmEngine(
            model.removeprefix("vllm:"),
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            engine_args=engine_args or {},
            chat=chat,
        )
    from cai_cli.engines.local.engine import LocalEngine

    return LocalEngine(model.removeprefix("local:"), batch_size=batch_size, device=device, dtype=dtype, chat=chat)


def _refuse_other_options(model: str, server: Server, engine_args: Mapping[str, Any] | None, chat: ChatOptions) -> None:
    """Raise UsageError for an option that is for another engine than that of the model."""
    if chat.template and model.startswith(("openai:", "scripted:")):
        raise UsageError("--chat-template is for models that run here", code="option-conflict")
    if chat.recorded() and model.startswith("scripted:"):
        raise UsageError("a script has no chat template to switch thoughts", code="option-conflict")
    if engine_args and not model.startswith("vllm:"):
        raise UsageError("--engine-arg is for vLLM", hint="use a vllm:NAME model", code="option-conflict")
    given = [name for name, value in asdict(server).items() if value is not None]
    if given and not model.startswith("openai:"):
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for a server", hint="use an openai:NAME model", code="option-conflict"
        )


def _refuse_other_values(model: str, batch_size: int | None, device: str, dtype: str) -> None:
    """Raise UsageError for a batch size, device or dtype that the engine of the model does not take."""
    if model.startswith("openai:") and (batch_size, device, dtype) != (None, "auto", "auto"):
        raise UsageError(
            "a server has no --batch-size, --device or --dtype",
            hint="use --concurrency N",
            code="option-conflict",
        )
    if model.startswith("vllm:") and dtype == "int8":
        raise UsageError(
            "vLLM has no --dtype int8",
            hint="use --engine-arg quantization=fp8, or a local:NAME model on a CPU",
            code="option-conflict",
        )
