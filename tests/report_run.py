"""A run folder with every part a report can show, written by hand: no model, no stage, a tenth of a second."""

import json
import random
from pathlib import Path
from typing import Any

from cai_cli.constitution.schema import CritiqueConstitution, PreferenceConstitution, open_constitution

Json = dict[str, Any]

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 2</script>",
    '<img src=x onerror="window.pwned = 3">',
    "</style><style>body { display: none }</style>",
    "-->]]></svg><svg onload=window.pwned=4>",
    "right to left \u202egnp.exe\u202c and \u2066isolated\u2069",
    "nul \x00 esc \x1b[31mred\x1b[0m bell \x07",
    "{{ 7 * 7 }} {% for x in y %} ${pwned} #{pwned}",
    '" onmouseover="window.pwned = 5" x="',
    "javascript:window.pwned=6 https://example.com/beacon.png",
    "=HYPERLINK(\"https://example.com\")",
    "$\\frac{1}{0}$ \\undefined_macro {",
    "שלום עולם, مرحبا",
]  # fmt: skip
WORDS = [
    "the",
    "reply",
    "says",
    "calmly",
    "what",
    "is",
    "safe",
    "and",
    "why",
    "it",
    "leaves",
    "the",
    "rest",
    "out",
    "so",
    "that",
    "nobody",
    "is",
    "hurt",
    "by",
    "it",
]


def manifest(
    stage: str, counts: Json, *, inputs: Json | None = None, argv: list[str] | None = None, **more: Json
) -> Json:
    facts = {
        "argv": argv or ["cai", stage],
        "finished_at": "2026-01-02T03:04:05+00:00",
        "seconds": 12.5,
        "inputs": inputs or {},
        "versions": {"python": "3.11", "torch": "2.13", "trl": "1.16"},
        "principles": [],
    }
    settings = {"seed": 0, "principles": None, "max_principles": None}
    provenance: Json = {
        "stage": stage,
        "cai": "0.1.0",
        "input": dict.fromkeys(inputs or {}, "ab" * 32),
        "settings": settings,
    }
    metrics = more.pop("metrics", None)
    provenance |= more
    return {"provenance": provenance, "counts": counts, "run": facts, **({"metrics": metrics} if metrics else {})}


def data_counts(out: int, **rejected: int) -> Json:
    total = sum(rejected.values())
    return {
        "in": out + total,
        "out": out,
        "rejected": total,
        "skipped": 0,
        "rejected_reasons": rejected,
        "skipped_reasons": {},
    }


def training_counts(used: int) -> Json:
    return {
        "in": used, "used": used, "train": used - 2, "held_out": 2, "rejected": 0, "skipped": 0,
        "rejected_reasons": {}, "skipped_reasons": {},
    }  # fmt: skip


def write(path: Path, rows: list[Json], beside: Json | None) -> None:
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    if beside:
        path.with_name(f"{path.name}.manifest.json").write_text(json.dumps(beside))


def write_model(path: Path, metrics: list[Json], beside: Json) -> None:
    path.mkdir()
    write(path / "metrics.jsonl", metrics, None)
    path.with_name(f"{path.name}.manifest.json").write_text(json.dumps(beside))


def message(role: str, content: str) -> list[Json]:
    return [{"role": role, "content": content}]


def sentence(rng: random.Random, count: int = 24) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count)).capitalize() + "."


def sample(number: int, reply: str, prompt: str | None = None) -> Json:
    return {
        "id": f"p{number}", "prompt": message("user", prompt or f"Question {number}, asked plainly?"), "kind": "red-team",
        "source": "made", "sample_index": 0, "completion": message("assistant", reply), "finish_reason": "stop",
        "thoughts": None,
    }  # fmt: skip


def revision(number: int, ids: list[str], rng: random.Random, texts: list[str]) -> Json:
    first = texts[number % len(texts)] if texts else sentence(rng)
    words = first.split()
    second = " ".join(rng.choice(WORDS) if rng.random() < 0.3 else w for w in words)
    third = f"{second} {sentence(rng, 6)}"
    turns = [
        {"round": r, "principle_id": rng.choice(ids), "critique": texts[(number + r) % len(texts)] if texts else sentence(rng, 12), "response": said, "finish_reason": "stop", "thoughts": None}
        for r, said in ((1, first), (2, second))
    ]  # fmt: skip
    return {**sample(number, third, texts[number % len(texts)] if texts else None), "history": turns}


def preference(number: int, ids: list[str], rng: random.Random, texts: list[str]) -> Json:
    strength = rng.uniform(0.5, 0.95)
    lean = rng.uniform(-0.25, 0.25)
    first = [min(1.0, max(0.0, p + lean)) for p in (strength, 1 - strength)]
    p_chosen = max(0.5, (first[0] + 1 - first[1]) / 2)
    principle = rng.choice(ids)
    votes = [
        {"principle_id": principle, "method": "choice", "order": order, "p_first": p, "rationale": None}
        for order, p in zip(("ab", "ba"), first, strict=True)
    ]
    return {
        "id": f"p{number}/0-1", "prompt": message("user", f"Question {number}, asked plainly?"),
        "chosen": message("assistant", texts[number % len(texts)] if texts else sentence(rng)),
        "rejected": message("assistant", sentence(rng)), "p_chosen": p_chosen, "votes": votes,
        "human": "chosen" if rng.random() < p_chosen else "rejected", "source": "made",
        "chosen_finish_reason": "stop", "rejected_finish_reason": "length",
    }  # fmt: skip


def rl_metrics(rng: random.Random) -> list[Json]:
    rows = []
    for step in range(1, 61):
        monitored = step % 10 == 0
        rows.append(
            {
                "step": step, "loss": rng.gauss(0, 0.05), "learning_rate": 1e-6, "grad_norm": 1 + rng.random(),
                "reward": step / 60 + rng.gauss(0, 0.1), "reward_std": 0.3, "shaped_reward": step / 70 + rng.gauss(0, 0.1),
                "kl": step / 40 + rng.random() * 0.1, "entropy": 2 - step / 100, "reply_tokens": 60 + step, "cut_off_share": 0.1,
                "monitor_score": (0.5 - (step - 30) ** 2 / 3000) if monitored else None,
                "boilerplate_share": step / 90 if monitored else None,
                "goodhart": "monitor_score falls while pm_score rises since step 0" if step == 50 else None,
            }
        )  # fmt: skip
    return rows


def make_run(folder: Path, *, rows: int = 30, hostile: bool = False, long: int = 0) -> Path:
    """A whole run of `rows` rows a file. `hostile`: rows that would like to be code. `long`: characters of one reply."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    texts = [*HOSTILE, *(["word " * (long // 5)] if long else [])] if hostile or long else []
    critique, compare = (open_constitution(kind, None, None) for kind in (CritiqueConstitution, PreferenceConstitution))
    ids, compare_ids = ([p.id for p in c.principles] for c in (critique, compare))
    if hostile:
        ids, compare_ids = [*ids[:3], *HOSTILE[:4]], [*compare_ids[:3], HOSTILE[10]]
    named = [{"name": c.name, "fingerprint": c.fingerprint()} for c in (critique, compare)]
    write(folder / "samples.jsonl", [sample(i, sentence(rng)) for i in range(rows)],
          manifest("sample", data_counts(rows, **{"empty reply": 2}), argv=["cai", "sample", "p.jsonl", "--model", "start"]))  # fmt: skip
    write(folder / "revisions.jsonl", [revision(i, ids, rng, texts) for i in range(rows)],
          manifest("critique-revise", data_counts(rows), inputs={"samples": "runs/samples.jsonl"}, constitution=named[0]))  # fmt: skip
    write_model(folder / "sl-cai", [{"step": i, "loss": 3 - i / 10, "token_accuracy": i / 20, "learning_rate": 1e-5} for i in range(1, 12)],
                manifest("sft", training_counts(rows), metrics={"steps": 11, "loss_before": 2.9, "loss": 1.9}))  # fmt: skip
    labelled = manifest("label-prefs", data_counts(rows, tie=3), constitution=named[1])
    labelled["run"]["usage"] = {
        "base_url": "http://x",
        "requests": 66,
        "prompt_tokens": 12_345,
        "new_tokens": 66,
        "cost": None,
    }
    write(folder / "preferences.jsonl", [preference(i, compare_ids, rng, texts) for i in range(rows)], labelled)
    accuracy = {"value": 0.7, "low": 0.55, "high": 0.82, "n": 40}
    bins = [
        {"from": p - 0.05, "to": p + 0.05, "confidence": p, "label": v, "n": 8}
        for p, v in ((0.55, 0.5), (0.7, 0.66), (0.9, 0.81))
    ]
    write_model(folder / "pm", [{"step": i, "accuracy": 0.5 + i / 40, "loss": 0.7 - i / 100, "held_out_loss": 0.7 if i == 1 else 0.66 if i == 9 else None} for i in range(1, 10)],
                manifest("train-pm", training_counts(rows), metrics={"steps": 9, "accuracy_before": {**accuracy, "value": 0.5}, "accuracy": accuracy, "at_chance": False, "accuracy_by_source": {"made": accuracy}, "calibration_curve": bins, "note": "A note on the model."}))  # fmt: skip
    write_model(folder / "rl-cai", rl_metrics(rng),
                manifest("rl", training_counts(rows), metrics={"steps": 60, "reward_before": 0.01, "reward": 0.98}))  # fmt: skip
    write(folder / "after.jsonl", [sample(i, HOSTILE[i % len(HOSTILE)] if hostile else sentence(rng)) for i in range(rows)],
          manifest("sample", data_counts(rows), argv=["cai", "sample", "p.jsonl", "--model", "runs/x/rl-cai"]))  # fmt: skip
    order = ["samples", "revisions", "sl-cai", "preferences", "pm", "rl-cai", "after"]
    steps = {
        name: {"key": "k", "argv": _argv(folder, name), "settings": {}, "files": {}, "status": "done", "seconds": 13.0}
        for name in order
    }
    (folder / "run.json").write_text(json.dumps({"steps": steps}))
    models = ["start", "sl-cai", HOSTILE[11] if hostile else "rl-cai"]
    axes = {axis: [{"model": m, "value": 1500.0 + 40 * i * sign, "low": 1470.0 + 40 * i * sign, "high": 1530.0 + 40 * i * sign, "n": 90} for i, m in enumerate(models)]
            for axis, sign in (("harmless", 1), ("helpful", -0.5))}  # fmt: skip
    wins = [{"a": models[0], "b": m, "kind": "red-team", "value": 0.4, "low": 0.3, "high": 0.5, "n": 90, "ties": 1} for m in models[1:]]  # fmt: skip
    (folder / "models.compare.json").write_text(json.dumps({"models": models, "ratings": axes, "win_rates": wins}))
    (folder / "rounds.sweep.json").write_text(json.dumps({
        "setting": "rounds", "figure": "pm_score",
        "points": [{"at": float(i), "value": i / 4, "low": i / 4 - 0.2, "high": i / 4 + 0.2, "n": 50} for i in range(5)]}))  # fmt: skip
    (folder / "hhh.json").write_text(
        json.dumps({"overall": accuracy, "harmless": {**accuracy, "value": 0.8}, "seconds": 3.5})
    )
    return folder


def _argv(folder: Path, name: str) -> list[str]:
    file = f"{name}.jsonl" if (folder / f"{name}.jsonl").exists() else name
    manifest_file = json.loads((folder / f"{file}.manifest.json").read_text())
    return [*manifest_file["run"]["argv"][1:], "-o", f"runs/x/{file}"]
