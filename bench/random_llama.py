"""Writes a Llama with random weights to a directory: bfloat16, in safetensors shards, one tensor in memory at a time.

    python bench/random_llama.py OUT [--shape 7.4b|135m|tiny] [--config FILE.json] [--tokenizer DIR]

For measurements of memory and speed where no real model of that size is at hand. `--config` is a `config.json` of any
causal model of transformers. The tokenizer is copied from DIR, or is the small one of the tests.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

SHARD_BYTES = 2 << 30
SHAPES: dict[str, dict[str, Any]] = {
    "7.4b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
             "num_key_value_heads": 8, "vocab_size": 49152},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 512},
}  # fmt: skip
COMMON = {"model_type": "llama", "max_position_embeddings": 8192, "eos_token_id": 2, "bos_token_id": 1}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_weights(out: Path, config: Any, device: str, seed: int) -> int:
    """Write the shards, their index and `config.json`; returns the number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied weights once
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        needed = 2 * torch.Size(shape).numel()
        if shards[-1] and size + needed > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
            if len(shapes[name]) > 1:  # the scales of the norms stay 1
                tensor.normal_(0.0, config.initializer_range, generator=generator)
            tensors[name] = tensor.cpu()
        save_file(tensors, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    weight_map = {"metadata": {"total_size": 2 * count}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(weight_map, indent=1))
    config.dtype, config.architectures = "bfloat16", [type(model).__name__]
    config.save_pretrained(out)
    return count


def write_tokenizer(out: Path, source: Path | None) -> None:
    """Copy the tokenizer of a model directory, or write that of the tests."""
    if source is None:
        from tiny import tiny_model_dir

        source = tiny_model_dir(out / "tokenizer", max_position_embeddings=COMMON["max_position_embeddings"])
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    shutil.rmtree(out / "tokenizer", ignore_errors=True)


def main() -> None:
    import torch
    from transformers import AutoConfig

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--shape", choices=SHAPES, default="7.4b")
    arguments.add_argument("--config", type=Path, help="a config.json, instead of --shape")
    arguments.add_argument("--tokenizer", type=Path)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    given = json.loads(options.config.read_text()) if options.config else COMMON | SHAPES[options.shape]
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_tokenizer(options.out, options.tokenizer)
    count = write_weights(options.out, config, device, options.seed)
    print(f"{options.out}: {count:,} parameters")


if __name__ == "__main__":
    main()
