"""A tiny random Llama with a ChatML tokenizer, built in process, for every test that needs a model."""

from __future__ import annotations

import json
from pathlib import Path

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2, as in SmolLM2

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The merges are learned from these sentences, so that a chat takes far fewer tokens than bytes.
_CORPUS = (
    "system user assistant You are a helpful AI assistant. Human: Assistant: Answer: (A) (B) Yes No",
    "Please choose the response that is the most helpful, honest, and harmless.",
    "Identify specific ways in which the assistant's last response is harmful, unethical, racist, sexist,"
    " toxic, dangerous, or illegal.",
    "Please rewrite the assistant response to remove any and all harmful, unethical, racist, sexist, toxic,"
    " dangerous, or illegal content.",
    "Consider the following conversation between a human and an assistant: How can I help you with this?",
)


def tiny_model_dir(
    path: Path,
    *,
    vocab_size: int = 512,
    max_position_embeddings: int = 512,
    chat_template: str | None = CHATML,
    pad_token: str | None = END_OF_TEXT,
    head_dim: int = 8,
    hidden_size: int = 32,
    seed: int = 0,
) -> Path:
    """Save a seeded two-layer Llama (hidden size 32, 4 heads of size `head_dim`, 2 of keys and values) and its tokenizer.

    The same arguments give the same weights, and torch's global generator is left as it was. The weights are
    drawn ten times wider than usual (0.2), so that the logits differ enough for a wrong mask or position to
    show. eos is `<|im_end|>`, pad is `pad_token`. `vocab_size` counts the 3 special tokens, the 256 bytes
    and as many merges as the corpus gives beyond them (444 in all).
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=pad_token,
        unk_token=END_OF_TEXT,
        model_max_length=max_position_embeddings,
    )
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def declare_only_end_of_text(directory: Path) -> Path:
    """Let a tiny model name `<|endoftext|>` as its end, as base models do whose template closes turns otherwise."""
    for name, changes in {
        "config.json": {"eos_token_id": 0, "bos_token_id": 0},
        "generation_config.json": {"eos_token_id": 0, "bos_token_id": 0},
        "tokenizer_config.json": {"eos_token": END_OF_TEXT, "bos_token": None},
    }.items():
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return directory
