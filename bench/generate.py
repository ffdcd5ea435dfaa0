"""Tokens a second: 64 replies of at most 128 tokens at temperature 1, ours against `model.generate` of transformers
with all rows in one left-padded batch.

    python bench/generate.py [--model smollm2-135m] [--rows 64] [--new-tokens 128] [--repeats 3]

Prints one line per paired run, then `ratio generate VALUE`: the median over the pairs of our tokens a second over
theirs. Only tokens of replies count, up to and with the one that ends a turn.
"""

import argparse
import random
import time
from statistics import median
from typing import Any

from cai_cli.engines.base import Ask, Reply, Sampling
from cai_cli.engines.chat import encode_chat
from cai_cli.engines.local import LocalEngine
from cai_cli.models import load_causal_lm
from cai_cli.records import Message

TOPICS = ("saving money", "a sore back", "an old piano", "moving abroad", "a noisy neighbour", "learning to cook")
ASKS = (
    "Can you give me some advice about {}?",
    "I have been thinking a lot about {} lately, and I would like to know what you would do in my place.",
    "Write a short story about {} in which two friends who have not met for years disagree, and then make up.",
)


def chats(rows: int) -> list[list[Message]]:
    rng = random.Random(0)
    texts = [f"{rng.choice(ASKS).format(rng.choice(TOPICS))} ({i})" for i in range(rows)]
    return [[Message(role="user", content=text)] for text in texts]


def generated(model: Any, tokenizer: Any, asked: list[list[Message]], new_tokens: int, end_ids: set[int]) -> int:
    """How many tokens transformers' own loop adds to these prompts."""
    import torch

    prompts = [encode_chat(tokenizer, chat, add_generation_prompt=True) for chat in asked]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=new_tokens, eos_token_id=sorted(end_ids))
    rows = out[:, batch["input_ids"].shape[1] :].tolist()
    return sum(next((i + 1 for i, token in enumerate(row) if token in end_ids), len(row)) for row in rows)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--rows", type=int, default=64)
    arguments.add_argument("--new-tokens", type=int, default=128)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    engine = LocalEngine(options.model, batch_size=options.rows, device="cpu", dtype="float32")
    model, asked, sampling = load_causal_lm(engine.path), chats(options.rows), Sampling(options.new_tokens)
    asks = [Ask(chat, seed) for seed, chat in enumerate(asked)]
    engine.generate(asks[:2], Sampling(2))  # loads the weights
    ratios = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        replies = engine.generate(asks, sampling)
        ours_s = time.perf_counter() - started
        theirs = generated(model, engine.tokenizer, asked, options.new_tokens, engine.end_ids)
        theirs_s = time.perf_counter() - started - ours_s
        ours = sum(reply.new_tokens for reply in replies if isinstance(reply, Reply))
        print(f"ours {ours / ours_s:.0f} tok/s ({ours}), transformers {theirs / theirs_s:.0f} tok/s ({theirs})")
        ratios.append(ours / ours_s / (theirs / theirs_s))
    print(f"ratio generate {median(ratios):.2f}")


if __name__ == "__main__":
    main()
