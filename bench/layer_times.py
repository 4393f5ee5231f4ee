"""Where a decode step of SmartKV spends its time, and what attention costs under any cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from smartkv_ext import SmartKVCache, ops
from smartkv_ext.hf.patching import attention_modules


class TimedCache(SmartKVCache):
    """A SmartKVCache with clocks. A layer call lasts from the model's update() to the end of packing; in it

    * ``packing``: after_attention(): is packing due, and if so score, select, pack, compact;
    * ``op``: ops called outside packing (one decode_attention per layer), counted inside ``timed_ops``;
    * the rest is Python: appending to the window, slicing, checks.

    The clocks cost about 1 us per layer call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reset_clocks()

    def reset_clocks(self) -> None:
        """Forget what was counted."""
        self.calls = 0
        self.seconds = {"layer": 0.0, "packing": 0.0, "op": 0.0}
        self._begin = 0.0
        self._is_packing = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer call begins."""
        self._begin = time.perf_counter()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def after_attention(self, layer_idx: int, softmax_scale: float) -> None:
        """A layer call ends."""
        start, self._is_packing = time.perf_counter(), True
        super().after_attention(layer_idx, softmax_scale)
        end, self._is_packing = time.perf_counter(), False
        self.calls += 1
        self.seconds["packing"] += end - start
        self.seconds["layer"] += end - self._begin

    @contextlib.contextmanager
    def timed_ops(self) -> Iterator[None]:
        """While open, calls of smartkv_ext.ops outside packing count as ``op``."""
        with contextlib.ExitStack() as stack:
            for name in ("decode_attention", "append_kv", "attention_mass"):
                stack.enter_context(mock.patch.object(ops, name, self._timed(getattr(ops, name))))
            yield

    def _timed(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = op(*args, **kwargs)
            if not self._is_packing:
                self.seconds["op"] += time.perf_counter() - start
            return result

        return timed

    def shares(self, decode_seconds: float) -> dict[str, float]:
        """Packing's share of the decode time, and microseconds per layer call: all, ops, packing, Python."""
        us = {name: seconds / max(self.calls, 1) * 1e6 for name, seconds in self.seconds.items()}
        return {
            "maintenance_share": self.seconds["packing"] / decode_seconds,
            "layer_call_us": us["layer"],
            "op_us": us["op"],
            "packing_us": us["packing"],
            "python_us": us["layer"] - us["op"] - us["packing"],
        }


@contextlib.contextmanager
def attention_clock(model: nn.Module) -> Iterator[list[float]]:
    """While open, seconds inside self-attention modules (projections, cache, attention) are added to the one item."""
    spent, begin = [0.0], [0.0]

    def before(*_: Any) -> None:
        begin[0] = time.perf_counter()

    def after(*_: Any) -> None:
        spent[0] += time.perf_counter() - begin[0]

    modules = list(attention_modules(model))
    hooks = [module.register_forward_pre_hook(before) for module in modules]
    hooks += [module.register_forward_hook(after) for module in modules]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()
