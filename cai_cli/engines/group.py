"""Several engines that one stage uses, together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from cai_cli.engines.base import Engine, EngineResources, Usage


class GroupUsage(Usage):
    """What several engines have used together."""

    def __init__(self, parts: Sequence[Usage]) -> None:
        super().__init__(", ".join(dict.fromkeys(part.base_url for part in parts)))
        self.parts, self.earlier, self.earlier_cost = parts, Usage(""), None

    def resume(self, recorded: Mapping[str, Any]) -> None:
        self.earlier.resume(recorded)
        self.earlier_cost = recorded["cost"]

    def as_json(self) -> dict[str, Any]:
        parts = [self.earlier, *self.parts]
        costs = [cost for cost in (self.earlier_cost, *(part.cost for part in self.parts)) if cost is not None]
        self.requests, self.prompt_tokens, self.new_tokens = (
            sum(getattr(part, name) for part in parts) for name in ("requests", "prompt_tokens", "new_tokens")
        )
        self.models = list(dict.fromkeys(model for part in parts for model in part.models))
        recorded = {name: getattr(self, name) for name in (field.name for field in fields(Usage))}
        return recorded | {"cost": sum(costs) if costs else None}


class EngineGroup(EngineResources):
    """The engines of a stage that sends requests to several models. The stage calls them one by one.

    Args:
        engines: The engines by name. One that is no longer needed can be removed (`release`).

    Attributes:
        largest_batch: How many items keep the engine with the largest batch, or the most workers, busy.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = dict(engines)
        self.batch_size = min(engine.batch_size for engine in engines.values())
        self.largest_batch = max(max(engine.batch_size, engine.workers) for engine in engines.values())
        usages = [engine.usage for engine in self._each() if engine.usage]
        self.usage = GroupUsage(usages) if usages else None

    def __getitem__(self, name: str) -> Engine:
        return self.engines[name]

    def _each(self) -> Iterator[Engine]:
        yield from {id(engine): engine for engine in self.engines.values()}.values()

    def release(self, name: str) -> None:
        """Close an engine and free its memory, unless it has another name in the group too."""
        engine = self.engines.pop(name)
        if all(engine is not other for other in self._each()):
            engine.close()

    def close(self) -> None:
        for engine in self._each():
            engine.close()

    def identity(self) -> dict[str, Any]:
        return {name: engine.identity() for name, engine in self.engines.items()}
