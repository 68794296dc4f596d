"""An evaluation as one CUDA graph: recorded once for each of the shapes it meets, then replayed.

A GPU takes about a millisecond for an evaluation of a small network, and a host several times that
to launch its hundreds of kernels one by one. A graph is launched at once, and reads and writes
the memory it had when it was recorded. So what an evaluation reads is copied to the same tensors
each time, and shapes are few: with a `rounded` cache the slots that attention looks at are a power
of two, of which the mask hides those without a token; and so are the positions whose logits are
wanted, with the first position in the place of those that nobody asked for.

Shapes: n rows, T columns, P positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdiff.cache import BlockCache
from blockdiff.device import rounded_up
from blockdiff.models.denoiser import Denoiser

MOST = 64  # graphs; past that they are recorded anew
DEVICES = {"cuda"}


def decoder(model: Denoiser, cache: BlockCache) -> Callable[..., Tensor]:
    """The model's `decode` for evaluations with this cache, recorded where that can be."""
    cache.rounded = model.graphs and model.device.type in DEVICES

    def decode(*given: Any, **named: Any) -> Tensor:
        return model.decode(*given, **named)  # looked up each time: it may be changed

    return Recorded(decode) if cache.rounded else decode


class Recorded:
    """`decode` of a `Denoiser`, replayed where its shapes were met before.

    On a CPU, where there is nothing to record, it is called with the same tensors. Its results are
    copies, which no later evaluation writes over.
    """

    def __init__(self, decode: Callable[..., Tensor]) -> None:
        self.decode = decode
        self.failed = False  # an operator cannot be recorded: from then on nothing is
        self._made: dict[tuple[Any, ...], tuple[list[Tensor | None], Callable[[], Tensor]]] = {}
        self._pool: Any = None  # memory that all graphs share: one runs at a time
        self._stream: Any = None

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        cache: BlockCache,
        at: Tensor,
        *,
        mask: Tensor | None = None,
        clean: int = 0,
        sigma: Tensor | None = None,
    ) -> Tensor:
        """Logits [P, V]; see `Denoiser.decode`."""
        if self.failed:
            return self.decode(x, positions, cache, at, mask=mask, clean=clean, sigma=sigma)
        count = len(at)
        given = [x, positions, F.pad(at, (0, rounded_up(count) - count)), mask, sigma]
        cache.reserve()
        shapes = tuple(None if one is None else one.shape for one in given)
        key = (id(cache), cache.made, cache.used, clean, *shapes)
        if key not in self._made:
            if len(self._made) >= MOST or any(old[:2] != key[:2] for old in self._made):
                self._made.clear()
            static = [None if one is None else one.clone() for one in given]

            def run() -> Tensor:
                x, positions, at, mask, sigma = static
                assert x is not None and positions is not None and at is not None
                return self.decode(x, positions, cache, at, mask=mask, clean=clean, sigma=sigma)

            self._made[key] = (
                static,
                (self._record(run, x.device) if x.device.type == "cuda" else run),
            )
        static, replay = self._made[key]
        for kept, new in zip(static, given, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new, non_blocking=True)
        return replay()[:count].clone()

    def _record(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        """A CUDA graph of a call; the call itself where one of its operators has none."""
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                run()  # libraries make their workspaces, which must be there before
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.failed = True
            reason = next(iter(str(error).splitlines()), "")
            warnings.warn(f"evaluations are not recorded as CUDA graphs: {reason}", stacklevel=2)
            return run
        finally:
            here.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
