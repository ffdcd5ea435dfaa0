"""How far full tuning and LoRA move SmolLM2-135M in equal steps at given learning rates.

    python bench/lora_rates.py sft HH-RLHF.jsonl full:2e-5 lora:2e-5 lora:2e-4
    python bench/lora_rates.py rl HH-RLHF.jsonl full:1e-6 lora:1e-6 lora:2e-5
    python bench/lora_rates.py train-pm HH-RLHF.jsonl full:2e-5 lora:2e-5 lora:2e-4

Five steps of four rows (pairs for train-pm) of at most 64 tokens. `rl` is a policy gradient with reward 1 for the
replies that humans chose and -1 for the others. Prints the KL divergence from the start model on eight held-out replies,
in nats per token, and the loss on them before and after; for train-pm the root mean square of the change of the
held-out margins instead of the KL divergence.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.nn.functional import logsigmoid

from cai_cli.models.loading import load_causal_lm, load_reward_model, load_tokenizer
from cai_cli.models.source import ModelSource
from cai_cli.training.config import TrainingConfig

STEPS, BATCH, HELD_OUT, LONGEST = 5, 4, 8, 64
Row = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen reply and rejected reply


def read_rows(file: str, tokenizer: Any) -> list[Row]:
    """The pairs with one human turn that are short enough, shuffled."""
    rows = []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        (prompt, chosen), (same, rejected) = (
            [part.strip() for part in pair[side].rsplit("\n\nAssistant:", 1)] for side in ("chosen", "rejected")
        )
        if prompt != same or prompt.count("Human:") != 1 or not chosen or not rejected:
            continue
        chat = [{"role": "user", "content": prompt.removeprefix("Human:").strip()}]
        start = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        replies = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in (chosen, rejected)]
        if len(start) + max(map(len, replies)) <= LONGEST and min(map(len, replies)) >= 8:
            rows.append((start, *replies))
    random.Random(0).shuffle(rows)
    return rows


def padded(sequences: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask, and a mask of the replies."""
    width = max(len(start) + len(reply) for start, reply in sequences)
    ids, mask, of_reply = (torch.zeros(len(sequences), width, dtype=torch.long) for _ in range(3))
    for row, (start, reply) in enumerate(sequences):
        end = len(start) + len(reply)
        ids[row, :end], mask[row, :end], of_reply[row, len(start) : end] = torch.tensor(start + reply), 1, 1
    return ids, mask, of_reply


def replies_logps(model: Any, sequences: list[tuple[list[int], list[int]]]) -> tuple[Any, Any, Any]:
    """Log-probabilities of the whole vocabulary and of the tokens, and the mask of the replies."""
    ids, mask, of_reply = padded(sequences)
    logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
    return logps, logps.gather(-1, ids[:, 1:, None])[..., 0], of_reply[:, 1:]


def margins(model: Any, rows: list[Row]) -> torch.Tensor:
    """Score of the chosen reply less that of the rejected one."""
    ids, mask, _ = padded([(start, chosen) for start, chosen, _ in rows] + [(start, rej) for start, _, rej in rows])
    scores = model(input_ids=ids, attention_mask=mask).logits[:, 0].float()
    return scores[: len(rows)] - scores[len(rows) :]


def loss_of(model: Any, rows: list[Row], stage: str) -> torch.Tensor:
    if stage == "train-pm":
        return -logsigmoid(margins(model, rows)).mean()
    chosen = [(start, reply) for start, reply, _ in rows]
    if stage == "sft":
        _, logps, of_reply = replies_logps(model, chosen)
        return -(logps * of_reply).sum() / of_reply.sum()
    _, logps, of_reply = replies_logps(model, (chosen + [(start, reply) for start, _, reply in rows])[::2])
    advantages = torch.tensor([1.0] * (len(rows) // 2) + [-1.0] * (len(rows) // 2))
    return -(advantages * (logps * of_reply).sum(1)).mean()


@torch.no_grad()
def measured(model: Any, rows: list[Row], stage: str) -> tuple[torch.Tensor, float]:
    """What is compared with the start model (margins, or distributions at the reply's tokens), and the loss."""
    model.eval()
    if stage == "train-pm":
        found = margins(model, rows)
        return found, float(-logsigmoid(found).mean())
    logps, tokens, of_reply = replies_logps(model, [(start, reply) for start, reply, _ in rows])
    return logps[of_reply.bool()], float(-(tokens * of_reply).sum() / of_reply.sum())


def train(stage: str, rows: list[Row], base: Path, run: str) -> None:
    kind, rate = run.split(":")
    torch.manual_seed(0)
    model: Any
    if stage == "train-pm":
        model = load_reward_model(base, "float32", "cpu", new_head_seed=0)
    else:
        model = load_causal_lm(base, "float32", "cpu")
    held_out, training = rows[:HELD_OUT], rows[HELD_OUT:]
    before, loss_before = measured(model, held_out, stage)
    if kind == "lora":
        config = TrainingConfig(BATCH, 1, float(rate), 1, 0, "cpu", lora_rank=16)
        model = get_peft_model(model, config.peft_config(classifier=stage == "train-pm"))
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=float(rate), weight_decay=0.0)
    for step in range(STEPS):
        loss_of(model, training[BATCH * step : BATCH * (step + 1)], stage).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(rate) * (1 if stage == "rl" else 1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
    after, loss = measured(model, held_out, stage)
    moved = after - before
    change = float(moved.square().mean().sqrt() if stage == "train-pm" else (after.exp() * moved).sum(-1).mean())
    print(f"{stage} {run}: moved {change:.3g}, held-out loss {loss_before:.4f} -> {loss:.4f}", flush=True)


def main() -> None:
    stage, file, *runs = sys.argv[1:]
    base = ModelSource.resolve("smollm2-135m").path
    rows = read_rows(file, load_tokenizer(base))
    for run in runs:
        train(stage, rows, base, run)


if __name__ == "__main__":
    main()
