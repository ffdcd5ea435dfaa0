"""Checks whether a row with the same seed gets the same tokens in batches of 1, 7 and 32, on a real model in float32.

    python bench/determinism.py [--model smollm2-135m] [--rows 32] [--new-tokens 64]

Where two replies diverge, the row's noise is compared with the interval of the cumulative distribution that belongs to
the token drawn in a batch of one. Within 1e-4 of either end it is a near-tie, which rounding decides. Prints `ratio
determinism VALUE`: the share of replies that are equal, near-ties counted as equal. Exits with 1 if it is less than 1.
"""

import argparse
import sys

from generate import chats

from cai_cli.engines.base import GenerationRequest, Sampling
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.engines.local.sampling import ActiveSequence, uniforms
from cai_cli.engines.tokenization import encode_chat

NEAR = 1e-4


def distance(engine: LocalEngine, alone: ActiveSequence, other: ActiveSequence) -> float:
    """The distance of the noise of the first differing token from the nearer end of that token's interval."""
    import torch

    at = next(i for i, (a, b) in enumerate(zip(alone.new, other.new, strict=False)) if a != b)
    with torch.inference_mode():
        (logits,) = engine._new_cache((), 0).add([alone.prompt + tuple(alone.new[:at])], [1])
    ends = torch.nn.functional.pad(logits[0].double().softmax(-1).cumsum(-1), (1, 0))
    interval = ends[alone.new[at] : alone.new[at] + 2]
    return float((interval - float(alone.noise[at])).abs().min())


def main() -> None:
    import torch

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--rows", type=int, default=32)
    arguments.add_argument("--new-tokens", type=int, default=64)
    options = arguments.parse_args()
    engine = LocalEngine(options.model, batch_size=1, device="cpu", dtype="float32")
    sampling = Sampling(options.new_tokens)
    found: list[list[ActiveSequence]] = []
    for batch_size in (1, 7, 32):
        engine.batch_size = batch_size
        rows = []
        for seed, chat in enumerate(chats(options.rows)):
            prompt = tuple(encode_chat(engine.tokenizer, chat, add_generation_prompt=True))
            rows.append(ActiveSequence(seed, GenerationRequest(chat, seed), prompt, uniforms(seed, options.new_tokens)))
        with torch.inference_mode():
            engine._decode(rows, sampling)
        found.append(rows)
        print(f"batches of {batch_size}: {sum(len(row.new) for row in rows)} tokens", flush=True)
    equal = near = 0
    for others in found[1:]:
        for alone, other in zip(found[0], others, strict=True):
            equal += alone.new == other.new
            near += alone.new != other.new and distance(engine, alone, other) < NEAR
    total = options.rows * (len(found) - 1)
    print(f"{equal} of {total} replies equal to those of rows alone, {near} near-ties")
    print(f"ratio determinism {(equal + near) / total:.4f}")
    sys.exit(equal + near < total)


if __name__ == "__main__":
    main()
