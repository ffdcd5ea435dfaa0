"""Measures how many tokens a second an engine writes, for `gpu_check.sh`: replies to conversations like those of HH-RLHF.

    python bench/gpu_engine.py transformers|local|vllm [--model smollm2-135m] [--rows 512] [--new-tokens 128]

One engine per process, because vLLM keeps the memory that it takes. `transformers` is `generate` in one batch,
left-padded, in the dtype that the other engines take on this device.
"""

import argparse
from typing import Any

from generate import chats, generated, timed

from cai_cli.engines import open_engine
from cai_cli.engines.base import Completion, GenerationRequest, Sampling
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.engines.tokenization import encode_chat
from cai_cli.models.loading import load_causal_lm


def transformers_work(model_name: str, rows: int, new_tokens: int) -> Any:
    engine = LocalEngine(model_name, batch_size=rows, device="auto", dtype="auto")
    model = load_causal_lm(engine.path, dtype=engine.dtype, device=engine.device)
    prompts = [encode_chat(engine.tokenizer, chat, add_generation_prompt=True) for chat in chats(rows)]
    return lambda count: generated(model, engine.tokenizer, prompts[:count], new_tokens, engine.end_ids, rows)


def engine_work(model_name: str, rows: int, new_tokens: int) -> Any:
    engine = open_engine(model_name, batch_size=None, device="auto", dtype="auto")
    requests = [GenerationRequest(chat, seed) for seed, chat in enumerate(chats(rows))]

    def work(count: int) -> int:
        replies = engine.generate(requests[:count], Sampling(new_tokens))
        return sum(reply.new_tokens for reply in replies if isinstance(reply, Completion))

    return work


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("engine", choices=("transformers", "local", "vllm"))
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--rows", type=int, default=512)
    arguments.add_argument("--new-tokens", type=int, default=128)
    options = arguments.parse_args()
    make = transformers_work if options.engine == "transformers" else engine_work
    name = f"vllm:{options.model}" if options.engine == "vllm" else options.model
    work = make(name, options.rows, options.new_tokens)
    work(8)  # loads the weights
    tokens, seconds = timed(work, options.rows)
    print(f"{options.engine}: {tokens / seconds:,.0f} tokens/s ({tokens} in {seconds:.1f} s)")


if __name__ == "__main__":
    main()
