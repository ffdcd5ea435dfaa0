"""The decoding step on CUDA, with fixed shapes: recorded as CUDA graphs and replayed.

A step of a small model is thousands of kernels, which take longer to launch than to run. A graph launches all of them
at once, but its shapes are fixed. So the rows are filled up to a quarter of the cache's rows and the columns up to
`_COLUMNS`: a decoding run needs a handful of graphs. Filling rows lie in unused places of the cache.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.engines.local.packed_attention import PackedPass

if TYPE_CHECKING:
    from torch import Tensor

    from cai_cli.engines.local.prefix_cache import PrefixCache

_COLUMNS = 128


class StaticPass(PackedPass):
    """A pass of one new token a row, whose positions are read from `columns` on the device when it runs."""

    def positions(self, rows: slice, first: int, count: int) -> "Tensor":
        return self.columns[rows, None]


class StaticSteps:
    """The steps of one cache, for as long as its buffers stay where they are."""

    def __init__(self, cache: "PrefixCache") -> None:
        import torch

        self.cache, self.device = cache, cache.model.device
        rows = cache.capacity[0]
        self.tokens = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.columns = torch.zeros(rows, dtype=torch.long, device=self.device)
        self.slots = torch.arange(rows, device=self.device)
        self.graphs: dict[tuple[int, int], tuple[Any, Tensor]] = {}
        self.pool: Any = None  # of the graphs' memory: one graph is replayed at a time
        self.can_record = self.device.type == "cuda"

    def __call__(self, tokens: "Tensor", lengths: Sequence[int]) -> "Tensor":
        """The logits after these tokens (rows, vocabulary), which the next call may overwrite.

        Args:
            tokens: (rows,).
            lengths: The number of own tokens of each row, with the new one.
        """
        import torch

        (most_rows, most_columns), count = self.cache.capacity, len(lengths)
        rows = min(_rounded_up(count, -(-most_rows // 4)), most_rows)
        columns = min(_rounded_up(max(lengths), _COLUMNS), most_columns)
        self.tokens[:count].copy_(tokens)
        self.columns[:count].copy_(torch.tensor(lengths) - 1)
        self.tokens[count:rows].zero_()
        self.columns[count:rows].zero_()
        if self.can_record and (rows, columns) not in self.graphs:
            self._record(rows, columns)
        if not self.can_record:
            return self._forward(rows, columns)[:count]
        graph, logits = self.graphs[rows, columns]
        graph.replay()
        return logits[:count]

    def _record(self, rows: int, columns: int) -> None:
        """Record the graph of this shape. A model that cannot be recorded is run without graphs."""
        import torch

        cuda: Any = torch.cuda
        aside = cuda.Stream()
        aside.wait_stream(cuda.current_stream())
        with cuda.stream(aside):  # libraries allocate at the first call, which must not be recorded
            self._forward(rows, columns)
        cuda.current_stream().wait_stream(aside)
        graph = cuda.CUDAGraph()
        try:
            with cuda.graph(graph, pool=self.pool):
                logits = self._forward(rows, columns)
        except RuntimeError as error:
            console.warn(f"the decoding step cannot be recorded as a CUDA graph, which is slower: {error}")
            self.can_record = False
            return
        self.graphs[rows, columns] = graph, logits
        self.pool = self.pool or graph.pool()

    def _forward(self, rows: int, columns: int) -> "Tensor":
        cache, place = self.cache, slice(0, rows)
        cache.current_pass = StaticPass(0, [1] * rows, self.columns[place], self.slots[place], [columns] * rows)
        logits: Tensor = cache.model(
            input_ids=self.tokens[place][None],
            position_ids=self.columns[place][None] + len(cache.start),
            past_key_values=cache,
            use_cache=True,
            prefix_cache=cache,
        ).logits
        return logits[0]


def _rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step
