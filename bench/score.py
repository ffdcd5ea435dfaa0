"""Measures scoring: 64 two-option comparisons behind a shared few-shot prefix of some 590 tokens.

    python bench/score.py [--model smollm2-135m] [--rows 64] [--repeats 3]

The local engine is compared with a plain batched forward pass of transformers over whole prompts (left-padded, in
batches of 8, last logits only). Prints one line per paired run, then `ratio score VALUE`: the median over the pairs of
the seconds of transformers over those of the local engine.
"""

import argparse
import random
import time
from itertools import chain
from statistics import median
from typing import Any

from cai_cli.data.schema import Message
from cai_cli.engines.base import LogprobRequest
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.engines.tokenization import encode_chat, encode_text
from cai_cli.models.loading import load_causal_lm
from cai_cli.prompting.comparison import OPTIONS

WORDS = [
    "people",
    "often",
    "ask",
    "how",
    "a",
    "careful",
    "answer",
    "can",
    "help",
    "without",
    "doing",
    "harm",
    "when",
    "the",
    "question",
    "is",
    "about",
    "money",
    "health",
    "work",
    "family",
    "travel",
    "food",
    "law",
    "music",
    "history",
    "and",
    "what",
    "to",
    "say",
    "next",
    "in",
    "plain",
    "kind",
    "words",
]
CUE = "The answer is: ("
BATCH = 8


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


def comparison(rng: random.Random, words: int) -> Message:
    """A request to choose between two replies to a conversation."""
    return Message(
        role="user",
        content=f"Consider the following conversation between a human and an assistant:\n\nHuman: "
        f"{sentence(rng, words)}\n\nWhich reply is more helpful, honest and harmless? Options:\n (A) {sentence(rng, words)}"
        f"\n (B) {sentence(rng, words)}",
    )


def chats(rows: int) -> list[list[Message]]:
    """`rows` comparisons after the same five worked examples."""
    rng = random.Random(0)
    shots: list[Message] = []
    for i in range(5):
        shots += [comparison(rng, 22), Message(role="assistant", content=f"The answer is: ({OPTIONS[i % 2]})")]
    return [[*shots, comparison(rng, rng.randint(10, 30))] for _ in range(rows)]


def plain(model: Any, tokenizer: Any, conversations: list[list[Message]]) -> list[list[float]]:
    """The scores of transformers alone for the same questions."""
    import torch

    first = [encode_text(tokenizer, option, start=False)[0] for option in OPTIONS]
    prefill = encode_text(tokenizer, CUE, start=False)
    prompts = [encode_chat(tokenizer, chat, add_generation_prompt=True) + prefill for chat in conversations]
    scores = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer.pad({"input_ids": prompts[start : start + BATCH]}, padding_side="left", return_tensors="pt")
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode():
            logits = model(**batch, position_ids=positions, logits_to_keep=1).logits[:, -1]
        scores += logits.log_softmax(-1)[:, first].tolist()
    return scores


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--rows", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    engine = LocalEngine(options.model, batch_size=options.rows, device="cpu", dtype="float32")
    model, conversations = load_causal_lm(engine.path), chats(options.rows)
    questions = [LogprobRequest(chat, OPTIONS, CUE) for chat in conversations]
    engine.option_logprobs(questions[:2])  # loads the weights
    ratios = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        cai_scores = engine.option_logprobs(questions)
        cai_s = time.perf_counter() - started
        peer_scores = plain(model, engine.tokenizer, conversations)
        peer_s = time.perf_counter() - started - cai_s
        pairs = zip((x for row in cai_scores if isinstance(row, list) for x in row), chain(*peer_scores), strict=True)
        print(
            f"cai {len(conversations) / cai_s:.2f}/s, transformers {len(conversations) / peer_s:.2f}/s, "
            f"largest difference {max(abs(x - y) for x, y in pairs):.1e}"
        )
        ratios.append(peer_s / cai_s)
    print(f"ratio score {median(ratios):.2f}")


if __name__ == "__main__":
    main()
