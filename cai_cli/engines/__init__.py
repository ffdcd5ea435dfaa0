"""Who answers. `open_engine` turns a model name into an Engine; engines know no stage."""

from dataclasses import asdict

from cai_cli.common.errors import UsageError
from cai_cli.engines.base import Engine, Server


def open_engine(model: str, *, batch_size: int | None, device: str, dtype: str, server: Server | None = None) -> Engine:
    """The engine for `--model`: `openai:NAME` on a server, `vllm:NAME`, `scripted:FILE`, or a directory, alias or Hub
    name for the local torch engine.

    Nothing heavy is loaded before the first request. Raises: UsageError for options that this engine does not have.
    """
    server = server or Server()
    if model.startswith("openai:"):
        if (batch_size, device, dtype) != (None, "auto", "auto"):
            raise UsageError("a server has no --batch-size, --device or --dtype", hint="--concurrency N")
        from cai_cli.engines.openai import EndpointEngine

        return EndpointEngine(model.removeprefix("openai:"), server)
    if given := [name for name, value in asdict(server).items() if value is not None]:
        raise UsageError(f"--{given[0].replace('_', '-')} is for a server", hint="an openai:NAME model")
    if model.startswith("scripted:"):
        from cai_cli.engines.scripted import ScriptedEngine

        return ScriptedEngine(model.removeprefix("scripted:"), batch_size or 64)
    if model.startswith("vllm:"):
        from cai_cli.engines.vllm import VllmEngine

        return VllmEngine(model.removeprefix("vllm:"), batch_size=batch_size, device=device, dtype=dtype)
    from cai_cli.engines.local.engine import LocalEngine

    return LocalEngine(model, batch_size=batch_size, device=device, dtype=dtype)
