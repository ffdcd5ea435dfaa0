"""Measures generation: 64 replies of at most 128 tokens at temperature 1 to conversations like those of HH-RLHF.

    python bench/generate.py [--model smollm2-135m] [--rows 64] [--new-tokens 128] [--repeats 3] [--batches 8 16 32 64]

The local engine is compared with `model.generate` of transformers at its best batch size (left-padded, rows sorted by
length). Each batch size is tried once. Then the script prints one line per paired run at the best one, the shares of the
machine's matmul peak that prefill and decoding of the local engine reach, and `ratio generate VALUE`: the median over
the pairs of its tokens a second over those of transformers. Only tokens of replies count, including the end of a turn.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from cai_cli.data.schema import Message
from cai_cli.engines.base import Completion, GenerationRequest, Sampling
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.engines.local.prefix_cache import shared_prefix
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.loading import load_causal_lm

TOPICS = ("saving money", "a sore back", "an old piano", "moving abroad", "a noisy neighbour", "learning to cook")
OPENINGS = (
    "Can you give me some advice about {}?",
    "I have been thinking a lot about {} lately, and I would like to know what you would do in my place.",
    "My sister says that I know nothing about {}. What should I tell her?",
)
ANSWERS = (
    "I'm sorry to hear that. What exactly is it about {} that worries you?",
    "There is a lot to say about {}. Most people begin with something small, see how it goes for a week or two, and "
    "only then decide whether they want to go on. It helps to write down what you have tried, and to ask somebody who "
    "has done it before. Is there anything in particular that you would like to know?",
)
FOLLOW_UPS = (
    "Why is that?",
    "I don't really think that this is true. A friend of mine has done it quite differently for years, and she is "
    "happier with {} than anybody else I know.",
    "Okay, but how do I do that without anybody noticing it?",
)


def chats(rows: int) -> list[list[Message]]:
    """Conversations of one to four turns of the user, some 120 tokens on average with a long tail, as in HH-RLHF."""
    rng, conversations = random.Random(0), []
    for _ in range(rows):
        topic = rng.choice(TOPICS)
        texts = [rng.choice(OPENINGS)]
        for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2, 2, 3))):
            texts += [" ".join(rng.choices(ANSWERS, k=rng.choice((1, 1, 1, 2)))), rng.choice(FOLLOW_UPS)]
        turns = [(("user", "assistant")[i % 2], text.replace("{}", topic)) for i, text in enumerate(texts)]
        conversations.append([Message(role=role, content=text) for role, text in turns])
    return conversations


def generated(model: Any, tokenizer: Any, prompts: Sequence[list[int]], new: int, ends: set[int], batch: int) -> int:
    """The number of tokens that `generate` of transformers adds to these prompts."""
    import torch

    torch.manual_seed(0)
    total, prompts = 0, sorted(prompts, key=len)
    for start in range(0, len(prompts), batch):
        padded = tokenizer.pad(
            {"input_ids": prompts[start : start + batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        out = model.generate(**padded, do_sample=True, top_k=0, max_new_tokens=new, eos_token_id=sorted(ends))
        rows = out[:, padded["input_ids"].shape[1] :].tolist()
        total += sum(next((i + 1 for i, token in enumerate(row) if token in ends), len(row)) for row in rows)
    return total


def timed(work: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work(*given)
    return result, time.perf_counter() - started


def peak_flops() -> float:
    """Floating point operations a second of the quickest large float32 product here: torch's own, or a packed layer."""
    import torch

    from cai_cli.engines.local.onednn import pack_linears

    size = 2048
    x, layer = torch.randn(size, size), torch.nn.Linear(size, size, bias=False)
    packed: Any = torch.nn.Sequential(layer)
    packed.device, packed.dtype = torch.device("cpu"), torch.float32
    pack_linears(packed)
    with torch.inference_mode():
        best = min(timed(work, x)[1] for work in (layer, packed) for _ in range(8))
    return float(2 * size**3 / best)


def flops(model: Any, tokens: int, logits: int, seen: float) -> float:
    """The operations of `tokens` tokens that attend to `seen` tokens each on average, with `logits` of them scored."""
    config = model.config
    head = config.vocab_size * config.hidden_size
    layers = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.dim() == 2)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen
    return float(2 * (tokens * (layers + attention) + logits * head))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--rows", type=int, default=64)
    arguments.add_argument("--new-tokens", type=int, default=128)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    options = arguments.parse_args()
    engine = LocalEngine(options.model, batch_size=options.rows, device="cpu", dtype="float32")
    model, conversations, sampling = load_causal_lm(engine.path), chats(options.rows), Sampling(options.new_tokens)
    prompts = [encode_chat(engine.tokenizer, chat, add_generation_prompt=True) for chat in conversations]
    mean = sum(map(len, prompts)) / len(prompts)
    distinct = {tuple(prompt) for prompt in prompts}
    shared = len(shared_prefix(list(distinct), [1] * len(distinct)))
    run_once = shared + sum(len(prompt) - shared for prompt in distinct)  # tokens of the prefill with prefix caching
    requests = [GenerationRequest(chat, seed) for seed, chat in enumerate(conversations)]
    engine.generate(requests[:2], Sampling(2))  # loads the weights
    peer_arguments = (model, engine.tokenizer, prompts, options.new_tokens, engine.end_ids)
    speeds = {}
    for batch in options.batches if len(options.batches) > 1 else ():
        tokens, seconds = timed(generated, *peer_arguments, batch)
        speeds[batch] = tokens / seconds
        print(f"transformers, batches of {batch}: {speeds[batch]:.0f} tok/s", flush=True)
    best = max(speeds, key=lambda batch: speeds[batch], default=options.batches[0])
    print(f"{options.rows} prompts of {mean:.0f} tokens on average; transformers in batches of {best}")
    ratios, prefill_shares, decode_shares = [], [], []
    for _ in range(options.repeats):
        peak = peak_flops()
        _, prefill_s = timed(engine.generate, requests, Sampling(1))
        replies, cai_s = timed(engine.generate, requests, sampling)
        peer_tokens, peer_s = timed(generated, *peer_arguments, best)
        cai_tokens = sum(reply.new_tokens for reply in replies if isinstance(reply, Completion))
        ratios.append(cai_tokens / cai_s / (peer_tokens / peer_s))
        prefill = flops(model, run_once, len(distinct), mean / 2)
        prefill_shares.append(prefill / prefill_s / peak)
        decode = flops(
            model, cai_tokens - len(requests), cai_tokens - len(requests), mean + cai_tokens / len(requests) / 2
        )
        decode_shares.append(decode / (cai_s - prefill_s) / peak)
        print(
            f"cai {cai_tokens / cai_s:.0f} tok/s ({cai_tokens}; decoding alone {cai_tokens / (cai_s - prefill_s):.0f}), "
            f"transformers {peer_tokens / peer_s:.0f} tok/s ({peer_tokens}), peak {peak / 1e9:.0f} GFLOP/s",
            flush=True,
        )
    print(f"share of the matmul peak: prefill {median(prefill_shares):.0%}, decoding {median(decode_shares):.0%}")
    print(f"ratio generate {median(ratios):.2f}")


if __name__ == "__main__":
    main()
