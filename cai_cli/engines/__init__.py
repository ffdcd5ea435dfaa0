"""Who answers. `open_engine` turns a model name into an Engine; engines know no stage."""

from cai_cli.engines.base import Engine


def open_engine(model: str, *, batch_size: int | None, device: str, dtype: str) -> Engine:
    """The engine for `--model`: `scripted:FILE`, or a directory, alias or Hub name for the local torch engine.

    Nothing heavy is loaded before the first request.
    """
    if model.startswith("scripted:"):
        from cai_cli.engines.scripted import ScriptedEngine

        return ScriptedEngine(model.removeprefix("scripted:"), batch_size or 64)
    from cai_cli.engines.local import LocalEngine

    return LocalEngine(model, batch_size=batch_size, device=device, dtype=dtype)
