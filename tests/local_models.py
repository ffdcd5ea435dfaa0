"""Tiny random models of several families, and requests for them."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from hypothesis import strategies as st
from tiny import tiny_model_dir

from cai_cli.data.schema import Message
from cai_cli.engines.base import Completion, GenerationRequest, Sampling
from cai_cli.engines.local.engine import LocalEngine

WINDOW = 9  # tokens seen by the sliding-window layers of the families that have them, far fewer than a prompt's

ROPE_LIMIT = 64  # tokens; the family "longrope" has other frequencies in longer rows


def family_config(family: str, vocab_size: int) -> Any:
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    grouped = shape | {"num_key_value_heads": 2}
    gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0}
    gemma3 = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 8.0],
        "original_max_position_embeddings": ROPE_LIMIT,
    }
    phi3_long = {"rope_parameters": longrope, "original_max_position_embeddings": ROPE_LIMIT}
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
    gpt2 = {"vocab_size": vocab_size, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "eos_token_id": 2}
    kind, settings = {
        "gemma": (transformers.GemmaConfig, grouped | {"head_dim": 8}),
        "gemma2": (transformers.Gemma2Config, grouped | gemma),
        "gemma3_text": (transformers.Gemma3TextConfig, grouped | gemma3),
        "gpt2": (transformers.GPT2Config, gpt2 | {"initializer_range": 0.2}),
        "mistral": (transformers.MistralConfig, grouped | {"sliding_window": WINDOW}),
        "phi": (transformers.PhiConfig, shape),
        "phi3": (transformers.Phi3Config, grouped | {"sliding_window": WINDOW}),
        "longrope": (transformers.Phi3Config, grouped | phi3_long),
        "dynamic": (transformers.LlamaConfig, grouped | dynamic | {"max_position_embeddings": 90}),
        "qwen2": (transformers.Qwen2Config, grouped),
        "qwen3": (transformers.Qwen3Config, grouped | {"head_dim": 8}),
    }[family]
    return kind(**settings)


@cache
def model_dir(family: str = "llama") -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny_model_dir(Path(mkdtemp(prefix="cai-test-")))
    if family != "llama":
        config = family_config(family, len(AutoTokenizer.from_pretrained(path)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(path)
    return path


@cache
def reference(family: str = "llama") -> Any:
    """The same model, to be run by transformers alone; eager attention, as sdpa knows no soft-capping."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir(family), attn_implementation="eager").eval()


@cache
def engine(family: str = "llama", batch_size: int | None = None) -> LocalEngine:
    return LocalEngine(str(model_dir(family)), batch_size=batch_size, device="cpu", dtype="float32")


def chat(*contents: str) -> list[Message]:
    return [Message(role="assistant" if i % 2 else "user", content=c) for i, c in enumerate(contents)]


def generation_requests(count: int = 10) -> list[GenerationRequest]:
    """Chats and raw texts of many lengths, the chats sharing their first turns."""
    shared = "Please choose the response that is the most helpful, honest, and harmless."
    return [
        GenerationRequest(chat(shared, "Yes", "How can I help " * (i % 5) + str(i)), seed=1000 + i)
        if i % 3
        else GenerationRequest(f"Human: Consider {'the following ' * i}", seed=i, prefill=" conversation")
        for i in range(count)
    ]


def replies(
    family: str, batch_size: int | None, wanted: Sequence[GenerationRequest], sampling: Sampling
) -> list[Completion]:
    answers = engine(family, batch_size).generate(wanted, sampling)
    assert all(isinstance(answer, Completion) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Completion)]


def greedy_tokens(family: str, ids: list[int], new: int) -> list[int]:
    """The new tokens of transformers' own `generate` for the row alone."""
    row = torch.tensor([ids])
    out = reference(family).generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=new, pad_token_id=0
    )
    return list(out[0, len(ids) :].tolist())


def prompt_ids(e: LocalEngine, request: GenerationRequest) -> list[int]:
    if isinstance(request.text, str):
        return list(e.tokenizer(request.text + request.prefill)["input_ids"])
    turns = [m.model_dump() for m in request.text]
    ids = e.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return list(ids) + list(e.tokenizer(request.prefill, add_special_tokens=False)["input_ids"])


ids = st.lists(st.integers(3, 5), min_size=1, max_size=12).map(tuple)
