"""The local engine: a model of a directory, alias or Hub name on this machine's CPU or GPU, in torch.

Rows are encoded by `chat`, drawn by `decoding`. Nothing heavy is loaded before the first request.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.engines.base import Ask, Question, Refusal, Reply, Sampling, Text
from cai_cli.engines.chat import encode_chat, encode_text
from cai_cli.engines.decoding import Row, Writer, check_finite, draw, end_of_turn_ids, uniforms
from cai_cli.errors import RowError, UsageError
from cai_cli.models import fingerprint, load_causal_lm, load_tokenizer, resolve

if TYPE_CHECKING:
    from torch import Tensor

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")


class LocalEngine:
    """Implements `Engine`. The same ask gets the same text in every batch, but for near-ties in rounding."""

    def __init__(self, model: str, *, batch_size: int | None, device: str, dtype: str) -> None:
        """`batch_size` None fits the device; `device` auto is cuda where there is one; `dtype` auto is float32 on
        CPU, bfloat16 on cuda. Raises: UsageError for any other value."""
        if device not in DEVICES:
            raise UsageError(f"--device must be one of {', '.join(DEVICES)}, not {device!r}")
        if dtype not in DTYPES:
            raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self._name, self._batch_size, self._asked_device, self._asked_dtype = model, batch_size, device, dtype

    # --- what it is -------------------------------------------------------------------------------------------

    @cached_property
    def batch_size(self) -> int:
        return self._batch_size or (256 if self.device == "cuda" else 64)

    @cached_property
    def device(self) -> str:
        import torch

        if self._asked_device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self._asked_device

    @cached_property
    def dtype(self) -> str:
        if self._asked_dtype == "auto":
            return "bfloat16" if self.device == "cuda" else "float32"
        return self._asked_dtype

    @cached_property
    def path(self) -> Path:
        return resolve(self._name)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    @cached_property
    def model(self) -> Any:
        return load_causal_lm(self.path, dtype=self.dtype, device=self.device)

    @cached_property
    def window(self) -> int:
        """Tokens that fit: prompt and answer together."""
        config = self.model.config.get_text_config()
        return min(self.tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))

    @cached_property
    def end_ids(self) -> set[int]:
        return end_of_turn_ids(self.tokenizer, self.model.generation_config)

    def identity(self) -> dict[str, Any]:
        return {"engine": "local", "fingerprint": fingerprint(self.path), "dtype": self.dtype}

    def speaks_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    # --- text -------------------------------------------------------------------------------------------------

    def generate(self, asks: Sequence[Ask], sampling: Sampling) -> list[Reply | Refusal]:
        """One answer per ask, in order. Raises: CaiError when the model's logits are not finite, or it has no chat
        template for a chat."""
        import torch

        replies: list[Reply | Refusal | None] = [None] * len(asks)
        rows = []
        for index, ask in enumerate(asks):
            ids = self._encode(ask.text, ask.cue)
            if isinstance(ids, Refusal) or (ids := self._fitting(ids, sampling.max_new_tokens)) is None:
                replies[index] = ids
            else:
                rows.append(Row(index, ask, ids))
        rows.sort(key=lambda row: len(row.prompt))
        with torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                self._generate_batch(rows[start : start + self.batch_size], sampling)
        for row in rows:
            replies[row.index] = row.reply
        return [reply for reply in replies if reply is not None]
