"""Tiny models that behave as published families do: their chat templates, begin and end tokens, and thoughts.

The templates are in our own words. They differ where families differ: who writes the begin token, whether there is a
system role, whether turns must alternate, what ends a turn, and what becomes of thoughts.
"""

from dataclasses import dataclass
from pathlib import Path

from tiny import tiny_model_dir

FRUIT, WANT, PEAR = "Name a fruit.", "They want a fruit.", "A pear."

_ALTERNATE = (
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}{% endfor %}"
)
_NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
_SPLIT = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How the models of a family write a conversation.

    Attributes:
        template: The chat template.
        special: Its control tokens, which decoding drops; the first is the begin token where the tokenizer adds one.
        eos: The end token that the tokenizer declares.
        end: The token that ends an assistant's turn.
        before: What the template writes between the generation prompt and the reply of a finished turn.
        after: What it writes after the reply, the end of the turn included.
        answer: What a model writes after the generation prompt for the question `FRUIT`.
        plain: Added tokens that decoding keeps.
        adds_begin: Whether there is a begin token, which the tokenizer adds to any text, as the template does.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    after: str
    answer: str
    before: str = ""
    plain: tuple[str, ...] = ()
    adds_begin: bool = False

    @property
    def thinks(self) -> bool:
        return WANT in self.answer


FAMILIES = {
    # Thinks unless switched off, keeps no thoughts of earlier turns, and begins the last turn with empty ones.
    "qwen3": Family(
        _SPLIT + "{% if system %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{% endif %}"
        "{% for m in turns %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'].split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        special=("<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        end="<|im_end|>",
        before="<think>\n\n</think>\n\n",
        after="<|im_end|>\n",
        answer=f"<think>\n{WANT}\n</think>\n\n{PEAR}<|im_end|>",
        plain=("<think>", "</think>"),
    ),
    # The template and the tokenizer both write the begin token; a date in the system turn; text is trimmed.
    "llama3": Family(
        _SPLIT + "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') }}"
        "{{ '\n\n' + system | trim + '<|eot_id|>' }}"
        "{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|end_of_text|>",
        end="<|eot_id|>",
        after="<|eot_id|>",
        answer=f"{PEAR}<|eot_id|>",
        adds_begin=True,
    ),
    # No system role, an assistant named model, strict alternation.
    "gemma": Family(
        _NO_SYSTEM + "{% set turns = messages %}" + _ALTERNATE + "{{ bos_token }}"
        "{% for m in turns %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        end="<end_of_turn>",
        after="<end_of_turn>\n",
        answer=f"{PEAR}<end_of_turn>",
        adds_begin=True,
    ),
    # No token but spaces around replies, and a system text that is written where the last user turn ends the chat.
    "mistral": Family(
        _SPLIT + _ALTERNATE + "{{ bos_token }}{% for m in turns %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if system and loop.last else '') + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        special=("<s>", "</s>"),
        eos="</s>",
        end="</s>",
        before=" ",
        after="</s>",
        answer=f" {PEAR}</s>",
        adds_begin=True,
    ),
    # A finished conversation ends with the end of a text after the end of the turn.
    "phi": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        end="<|end|>",
        after="<|end|>\n<|endoftext|>",
        answer=f"{PEAR}<|end|>",
    ),
    # Opens the thoughts in the generation prompt, and drops them from every finished turn.
    "deepseek-r1": Family(
        _SPLIT + "{{ bos_token + system }}{% for m in turns %}{% if m['role'] == 'user' %}"
        "{{ '<|User|>' + m['content'] }}{% else %}"
        "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        special=("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"),
        eos="<|end_of_sentence|>",
        end="<|end_of_sentence|>",
        before="\n</think>\n\n",
        after="<|end_of_sentence|>",
        answer=f"{WANT}\n</think>\n\n{PEAR}<|end_of_sentence|>",
        plain=("<think>", "</think>"),
        adds_begin=True,
    ),
    # Channels with headers; the system text is the developer's; the last turn ends with another token than earlier ones.
    "gpt-oss": Family(
        _SPLIT + "{{ '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') }}"
        "{{ '\n\nReasoning: ' + reasoning_effort | default('medium') + '<|end|>' }}"
        "{% if system %}{{ '<|start|>developer<|message|># Instructions\n\n' + system + '<|end|>' }}{% endif %}"
        "{% for m in turns %}{% if m['role'] == 'user' %}"
        "{{ '<|start|>user<|message|>' + m['content'] + '<|end|>' }}{% else %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        special=("<|startoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        eos="<|return|>",
        end="<|return|>",
        before="<|channel|>final<|message|>",
        after="<|return|>",
        answer=f"<|channel|>analysis<|message|>{WANT}<|end|><|start|>assistant<|channel|>final<|message|>{PEAR}<|return|>",
    ),
}


def family_model_dir(path: Path, family: Family, **settings: int) -> Path:
    """A tiny random model with the template and the tokens of a family. It names only `eos` as its end.

    Args:
        path: The directory to write.
        family: The family.
        settings: As for `tiny_model_dir`.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model_dir(path, chat_template=family.template, **settings)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(list(family.plain))
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.eos_token, tokenizer.bos_token = family.eos, None
    if family.adds_begin:
        tokenizer.bos_token = begin = family.special[0]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return path
