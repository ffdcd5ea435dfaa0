"""The README.md of a trained model."""

from collections.abc import Mapping
from typing import Any

import yaml

from cai_cli.cards.markdown import cell
from cai_cli.models.names import hub_base
from cai_cli.models.source import ModelSource

PAPER = "[Constitutional AI](https://arxiv.org/abs/2212.08073)"
READING = (
    "The score of a conversation is read at the token that ends its last turn; white space that the chat template adds "
    "after that token is left out (`preference_model.json`).\n\n"
)
MEAN_READING = (
    "The score of a conversation is the mean over the tokens of its last reply, without its end of turn "
    "(`preference_model.json`). Servers of classifiers and TRL read one token and give other scores.\n\n"
)
LAYER_READING = "It is that of the head on the output of layer {}, without the final norm.\n\n"


def model_card(manifest: Mapping[str, Any], models: Mapping[str, ModelSource]) -> str:
    """Return the README.md of a finished model: what it was made from, its settings and its metrics.

    Args:
        manifest: Manifest of the model.
        models: Role ("model", "pm", ...) -> the model that it was made from.
    """
    provenance, stage = manifest["provenance"], manifest["provenance"]["stage"]
    metrics = manifest["metrics"]
    base = models["model"]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["constitutional-ai", f"cai-{stage}", "trl"]}
    if base.license:
        head["license"] = base.license
    if on_hub := hub_base(base.name):
        head["base_model"] = on_hub

    def table(title: str, values: Mapping[str, Any]) -> str:
        rows = "".join(f"| {cell(name)} | {_cell(value)} |\n" for name, value in values.items())
        return f"## {title}\n\n| | |\n|---|---|\n{rows}\n"

    made_from = {f"{role} `{m.public_name}`": f"`{m.fingerprint}`" for role, m in models.items()}
    hashes = {f"input `{name}`": f"`{value}`" for name, value in provenance["input"].items() if value}
    hashes["rows, sha256"] = f"`{provenance['rows']['sha256']}`"
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=True)}---\n\n# {stage} of {base.public_name}\n\n"
        f"Made by `cai {stage}` {provenance['cai']} ({PAPER}).\n\n"
        + (f"**{metrics['note']}**\n\n" if metrics.get("note") else "")
        + (_reading(provenance["settings"]) if stage == "train-pm" else "")
        + table("Made from", made_from | hashes)
        + "".join(
            table(f"Principles: {p['constitution']}, drawn in {p['stage']}", _draws(p))
            for p in manifest["run"]["principles"]
        )
        + (table("Judge of the reward", _judge(provenance)) if provenance.get("judge") else "")
        + table("Rows", {k: v for k, v in manifest["counts"].items() if not k.endswith("_reasons")})
        + table("Settings", provenance["settings"])
        + table("Metrics", {k: v for k, v in _flat(metrics).items() if k != "note"})
        + table("Training", manifest["run"]["training"])
        + table("Versions", manifest["run"]["versions"])
    )


def _reading(settings: Mapping[str, Any]) -> str:
    """Where the score of a preference model is read."""
    place = MEAN_READING if settings.get("read_at") == "mean-over-reply" else READING
    return place + (LAYER_READING.format(settings["layer"]) if settings.get("layer") else "")


def _judge(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows about the judge of `cai rl --judge`: engine, fingerprint or name, and constitution."""
    return {name: f"`{value}`" for name, value in provenance["judge"].items()}


def _flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics by name; a metric with several parts or bins becomes as many metrics."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            flat |= {f"{name}, bin {k}": part for k, part in enumerate(value, start=1)}
        elif isinstance(value, dict) and "value" not in value:
            flat |= {f"{name}, {part}": inner for part, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _draws(principles: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows about one entry of `recorded_principles`: its hash, and how often each principle was drawn."""
    return {
        "fingerprint": f"`{principles['fingerprint']}`",
        **{f"`{name}`": f"{count:,} times" for name, count in principles["drawn"].items()},
    }


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "value" not in value:
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
    if isinstance(value, dict):
        return f"{value['value']:.3f} (95%: {value['low']:.3f} to {value['high']:.3f}, n = {value['n']})"
    return cell(value)
