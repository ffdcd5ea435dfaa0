"""The decoding step of Llama-like models on a CPU: a few calls a layer instead of a hundred.

It runs the model's own linear layers, and `decode_kernels` between them. Other models and devices decode by the model's
own `forward`.
"""

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_cli.engines.local.decode_kernels import LANES, Attention, address, library

if TYPE_CHECKING:
    from torch import Tensor

# Model types of RMSNorm, rotary positions, attention with grouped heads and a gated SiLU, and nothing else.
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def decode_step(model: Any) -> "DecodeStep | None":
    """The quick decoding step for this model, or None if it is not one of those or has to be run in torch."""
    import torch

    fits = model.config.model_type in MODEL_TYPES and model.config.hidden_act == "silu"
    on_cpu = model.device.type == "cpu" and model.dtype == torch.float32
    return DecodeStep(model) if fits and on_cpu and library() is not None else None


class DecodeStep:
    """Runs one new token of each row, and stores its keys and values.

    Args:
        model: A causal language model of `MODEL_TYPES` in float32 on a CPU.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config, attention = model.config, model.model.layers[0].self_attn
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.size: int = attention.head_dim
        of_model = config.sliding_window if config.model_type == "mistral" else None
        self.windows = [getattr(layer.self_attn, "sliding_window", of_model) or 0 for layer in model.model.layers]

    def __call__(
        self,
        tokens: "Tensor",
        lengths: Sequence[int],
        buffers: "Sequence[tuple[Tensor, Tensor]]",
        prefix: "Sequence[tuple[Tensor, Tensor]]",
    ) -> "Tensor":
        """The logits after these tokens (rows, vocabulary).

        Args:
            tokens: (rows,).
            lengths: The number of own tokens of each row, with the new one.
            buffers: Keys and values of each layer, as `PrefixCache.buffers`; those of the new tokens are stored here.
            prefix: Those of the shared prefix, as `PrefixCache.prefix`; empty if there is none.
        """
        import torch

        inner = self.model.model
        hidden = inner.embed_tokens(tokens)
        normed, delta = torch.empty_like(hidden), None
        counts = torch.tensor(lengths)
        call = self._attention(hidden, counts, buffers[0][0], prefix)
        shared = prefix[0][0].shape[1] if prefix else 0
        cosines, sines = inner.rotary_emb(hidden[None], (counts - 1 + shared)[None])
        call.cosines, call.sines, call.rotary = address(cosines), address(sines), cosines.shape[-1]
        context = hidden.new_empty(len(lengths), self.heads * self.size)
        scratch = hidden.new_empty(call.threads * self.heads // self.key_heads * (2 * self.size + call.longest))
        call.out, call.scratch = address(context), address(scratch)
        for index, layer in enumerate(inner.layers):
            self._add_norm(hidden, delta, layer.input_layernorm, normed)
            attention = layer.self_attn
            query, key, value = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
            self._attend(call, index, (query, key, value), buffers[index], prefix[index] if prefix else None)
            self._add_norm(hidden, attention.o_proj(context), layer.post_attention_layernorm, normed)
            gate, up = layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed)
            library().gate(address(gate), address(up), *gate.shape, call.threads)
            delta = layer.mlp.down_proj(gate)
        self._add_norm(hidden, delta, inner.norm, normed)
        logits: Tensor = self.model.lm_head(normed)
        return logits

    def _attention(
        self, hidden: "Tensor", lengths: "Tensor", keys: "Tensor", prefix: "Sequence[tuple[Tensor, Tensor]]"
    ) -> Attention:
        """What the attention of every layer has in common."""
        import torch

        shared = prefix[0][0].shape[1] if prefix else 0
        return Attention(
            lengths=address(lengths),
            rows=len(hidden),
            heads=self.heads,
            key_heads=self.key_heads,
            size=self.size,
            columns=keys.stride(3),
            shared=shared,
            prefix_columns=prefix[0][0].stride(2) if prefix else 0,
            longest=shared + int(lengths.max()) + 2 * LANES,
            threads=torch.get_num_threads(),
        )

    def _attend(
        self,
        call: Attention,
        index: int,
        new: "tuple[Tensor, Tensor, Tensor]",
        buffers: "tuple[Tensor, Tensor]",
        prefix: "tuple[Tensor, Tensor] | None",
    ) -> None:
        """Fill `call.out` with the attention of layer `index` for the queries, keys and values `new`."""
        attention = self.model.model.layers[index].self_attn
        call.query, call.key, call.value = map(address, new)
        call.keys, call.values = map(address, buffers)
        call.prefix_keys, call.prefix_values = map(address, prefix or (None, None))
        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        if query_norm is not None and key_norm is not None:
            call.query_norm, call.key_norm = address(query_norm.weight), address(key_norm.weight)
            call.eps = query_norm.variance_epsilon
        call.scaling, call.window = attention.scaling, self.windows[index]
        library().attend(ctypes.byref(call))

    def _add_norm(self, hidden: "Tensor", delta: "Tensor | None", norm: Any, out: "Tensor") -> None:
        """Add `delta` to `hidden`; `out` becomes its norm."""
        import torch

        weight, eps = address(norm.weight), norm.variance_epsilon
        library().add_norm(
            address(hidden), address(delta), weight, eps, address(out), *hidden.shape, torch.get_num_threads()
        )
