"""Compares the local engine with other engines on the replies of `generate.py` and the comparisons of `score.py`.

All engines get the same token ids. A peer is installed in its own environment and skipped if that does not exist:

    python -m venv .peers/openvino && .peers/openvino/bin/pip install openvino-genai
    optimum-cli export openvino --model MODEL_DIR --weight-format fp32 .peers/openvino/model   # of optimum-intel
    python -m venv .peers/llama && .peers/llama/bin/pip install llama-cpp-python
    convert_hf_to_gguf.py MODEL_DIR --outtype f32 --outfile .peers/llama/model.gguf            # of llama.cpp

    python bench/peers.py [--model smollm2-135m] [--peers .peers] [--rows 64] [--new-tokens 128] [--repeats 3] [--threads N]

OpenVINO GenAI runs all rows in its ContinuousBatchingPipeline, in float32, with prefix caching; it answers a comparison
with its most probable next token. llama.cpp runs all rows in one batch, a sequence for each, in the precision of the
GGUF file with a float32 cache; its cache does not hold a shared prefix once. Prints one line per paired run and, for each peer and task, `ratio NAME VALUE`: the median of the speed
of the local engine over that of the peer.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

Work = Callable[[list[list[int]], int], int]  # prompts, new tokens -> the number of generated tokens


def openvino(home: Path, threads: int) -> Work:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 4  # GB
    scheduler.enable_prefix_caching = True
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": threads}
    pipeline = genai.ContinuousBatchingPipeline(str(home / "model"), scheduler, "CPU", exact)

    def run(prompts: list[list[int]], new: int) -> int:
        config = genai.GenerationConfig(max_new_tokens=new, do_sample=new > 1, temperature=1.0, top_p=1.0)
        config.set_eos_token_id(pipeline.get_tokenizer().get_eos_token_id())
        ids = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(ids, [config] * len(ids))
        return sum(len(result.m_generation_ids[0]) for result in results)

    return run


def llama(home: Path, threads: int) -> Work:
    import llama_cpp
    from llama_cpp._logger import set_verbose

    set_verbose(False)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(home / "model.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    end = llama_cpp.llama_vocab_eos(llama_cpp.llama_model_get_vocab(model))

    def run(prompts: list[list[int]], new: int) -> int:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = sum(map(len, prompts)) + len(prompts) * new
        settings.n_batch = settings.n_ubatch = 512
        settings.n_seq_max, settings.kv_unified = len(prompts), True
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, settings)
        sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        llama_cpp.llama_sampler_chain_add(sampler, llama_cpp.llama_sampler_init_dist(0))
        batch = llama_cpp.llama_batch_init(512, 0, 1)
        made: list[list[int]] = [[] for _ in prompts]

        def decode(tokens: list[tuple[int, int, int, bool]]) -> None:
            """Run (row, position, token, whether to sample after it), and append what is sampled."""
            for start in range(0, len(tokens), 512):
                part = tokens[start : start + 512]
                batch.n_tokens = len(part)
                for i, (row, position, token, last) in enumerate(part):
                    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, last
                    batch.seq_id[i][0] = row
                if llama_cpp.llama_decode(context, batch):
                    raise RuntimeError("llama_decode failed")
                for i, (row, _, _, last) in enumerate(part):
                    if last:
                        made[row].append(llama_cpp.llama_sampler_sample(sampler, context, i))

        decode([(row, i, t, i == len(p) - 1) for row, p in enumerate(prompts) for i, t in enumerate(p)])
        while active := [row for row, tokens in enumerate(made) if len(tokens) < new and tokens[-1] != end]:
            decode([(row, len(prompts[row]) + len(made[row]) - 1, made[row][-1], True) for row in active])
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_sampler_free(sampler)
        llama_cpp.llama_free(context)
        return sum(map(len, made))

    return run


PEERS = {"openvino": openvino, "llama": llama}


def work(name: str, home: Path, threads: int) -> None:
    """Runs in the peer's environment: reads one job (JSON) per line of stdin, and prints [tokens, seconds] for each."""
    run = PEERS[name](home, threads)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        tokens = run(job["prompts"], job["new"])
        print("peer", json.dumps([tokens, time.perf_counter() - started]), flush=True)


class Peer:
    """A peer that runs in its own environment."""

    def __init__(self, name: str, home: Path, threads: int) -> None:
        command = [str(home / "bin" / "python"), __file__, "--work", name, "--peers", str(home.parent)]
        command += ["--threads", str(threads)]
        self.process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, prompts: list[list[int]], new: int) -> tuple[int, float]:
        self.process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        answer = next(line for line in self.process.stdout if line.startswith("peer "))
        tokens, seconds = json.loads(answer.removeprefix("peer "))
        return tokens, seconds

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(options: argparse.Namespace) -> None:
    import generate
    import score
    import torch

    from cai_cli.engines.base import Completion, GenerationRequest, LogprobRequest, Sampling
    from cai_cli.engines.local.engine import LocalEngine
    from cai_cli.engines.tokenization import encode_chat, encode_text
    from cai_cli.prompting.comparison import OPTIONS

    torch.set_num_threads(options.threads)
    engine = LocalEngine(options.model, batch_size=options.rows, device="cpu", dtype="float32")
    chats, comparisons = generate.chats(options.rows), score.chats(options.rows)
    prefill = encode_text(engine.tokenizer, score.CUE, start=False)
    prompts = [encode_chat(engine.tokenizer, chat, add_generation_prompt=True) for chat in chats]
    judged = [encode_chat(engine.tokenizer, chat, add_generation_prompt=True) + prefill for chat in comparisons]
    requests = [GenerationRequest(chat, seed) for seed, chat in enumerate(chats)]
    questions = [LogprobRequest(chat, OPTIONS, score.CUE) for chat in comparisons]
    engine.option_logprobs(questions[:2])  # loads the weights
    for name in PEERS:
        home = options.peers / name
        if not (home / "bin" / "python").exists():
            print(f"{name}: skipped, no {home / 'bin' / 'python'}")
            continue
        ratios: dict[str, list[float]] = {"generate": [], "score": []}
        for _ in range(options.repeats):
            peer = Peer(name, home, options.threads)  # a new process each time, because it caches the prompts
            peer(prompts[:2], 2)
            replies, cai_s = generate.timed(engine.generate, requests, Sampling(options.new_tokens))
            cai_tokens = sum(reply.new_tokens for reply in replies if isinstance(reply, Completion))
            peer_tokens, peer_s = peer(prompts, options.new_tokens)
            ratios["generate"].append(cai_tokens / cai_s / (peer_tokens / peer_s))
            _, scored_s = generate.timed(engine.option_logprobs, questions)
            _, judged_s = peer(judged, 1)
            ratios["score"].append(judged_s / scored_s)
            peer.end()
            print(
                f"cai {cai_tokens / cai_s:.0f} tok/s ({cai_tokens}), {len(judged) / scored_s:.2f} comparisons/s; "
                f"{name} {peer_tokens / peer_s:.0f} tok/s ({peer_tokens}), {len(judged) / judged_s:.2f} comparisons/s",
                flush=True,
            )
        for kind, values in ratios.items():
            print(f"ratio {name}-{kind} {median(values):.2f}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2-135m")
    arguments.add_argument("--peers", type=Path, default=Path(".peers"))
    arguments.add_argument("--rows", type=int, default=64)
    arguments.add_argument("--new-tokens", type=int, default=128)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine")
    arguments.add_argument("--work", choices=PEERS, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.work:
        work(options.work, options.peers / options.work, options.threads)
    else:
        compare(options)


if __name__ == "__main__":
    main()
