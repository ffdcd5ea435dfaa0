"""Tiny models whose chat templates treat thoughts as published families do. The templates are in our own words."""

from pathlib import Path

from tiny import tiny_model_dir

_TURNS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "%BEFORE%{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
_START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}%OPENING%{% endif %}"

# Thinks by default, writes both tags itself, and can be switched off, as Qwen3.
SWITCHED = _TURNS.replace(
    "%BEFORE%", "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
) + _START.replace("%OPENING%", "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}")
# Opens the thoughts in every generation prompt, and renders finished turns without them, as DeepSeek-R1.
OPENED = _TURNS.replace("%BEFORE%", "") + _START.replace("%OPENING%", "{{ '<think>\n' }}")
# Thoughts in brackets that are special tokens, as Mistral's reasoning models.
BRACKETS = _TURNS.replace("%BEFORE%", "") + _START.replace(
    "%OPENING%", "{% if reasoning_effort == 'high' %}{{ '[THINK]' }}{% endif %}"
)
# A channel with an opening and a closing token, switched by an argument, as Gemma.
CHANNEL_TAGS = _TURNS.replace("%BEFORE%", "") + _START.replace(
    "%OPENING%", "{% if not enable_thinking | default(false) %}{{ '<|channel>thought\n<channel|>' }}{% endif %}"
)
# Named channels with headers, as gpt-oss.
CHANNELS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
CONTROL = {
    SWITCHED: [],
    OPENED: [],
    BRACKETS: ["[THINK]", "[/THINK]"],
    CHANNEL_TAGS: ["<|channel>", "<channel|>"],
    CHANNELS: ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
}


def thinking_model_dir(path: Path, template: str) -> Path:
    """A tiny random model with this template and its control tokens, which are special as in the published models."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model_dir(path, chat_template=template)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if "think>" in template:  # added tokens, but no special ones
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL[template]})
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if template == CHANNELS:
        tokenizer.eos_token = CONTROL[template][-1]
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return path


def taught(path: Path, prompt: str, answer: str) -> Path:
    """The model in a directory, overfitted to write `answer`, control tokens included, after the generation prompt."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    start = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(start + answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path
