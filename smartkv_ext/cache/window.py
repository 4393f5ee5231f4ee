"""The dense part of one layer: sinks and the recent window, in the model's dtype, the same tokens for all heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROWTH = 64  # least slots that are added ahead of tokens


class DenseWindow:
    """Slots [0, sink_slots) hold the first tokens once they have left the window; then come the newest tokens, in
    order.

    ``buffers`` are (batch, num_kv_heads, capacity, head_dim) tensors by name: "k", "v" and, for policies that score it,
    "pre_rope" (the key before its rotation). ``sums`` are further buffers (batch, num_kv_heads, capacity, 1) float32,
    which start at 0 for every token.

    Slots that wait for a token have the position that it will have, so that a decode step writes keys and values alone;
    attention does not see them, since they lie in the future of every query.
    """

    def __init__(
        self, names: tuple[str, ...], shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device,
        sums: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.buffers = {name: torch.empty(shape, dtype=dtype, device=device) for name in names}
        self.buffers |= {name: torch.zeros(*shape[:3], 1, dtype=torch.float32, device=device) for name in sums}
        self.positions = torch.full((shape[0], shape[2]), -1, dtype=torch.int32, device=device)
        self.used = 0
        self.sink_slots = 0
        self._ready: int | None = None  # position that the next token must have for the waiting slots to be right

    @property
    def shape(self) -> torch.Size:
        """(batch, num_kv_heads, capacity, head_dim)."""
        return self.buffers["k"].shape

    def held(self, name: str) -> torch.Tensor:
        """View of a buffer's slots in use: (batch, num_kv_heads, used, head_dim)."""
        return self.buffers[name][:, :, : self.used]

    def held_positions(self) -> torch.Tensor:
        """View (batch, used) int32: logical index, -1 where the slot holds no token."""
        return self.positions[:, : self.used]

    def check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Raise ValueError for new keys or values (batch, num_kv_heads, q_len, head_dim) unlike those held."""
        batch, heads, _, head_dim = self.shape
        expected, held = (batch, heads, k.shape[2], head_dim), self.buffers["k"]
        for name, x in (("key_states", k), ("value_states", v)):
            if x.shape != expected or x.dtype != held.dtype or x.device != held.device:
                raise ValueError(
                    f"{name} must be {expected} {held.dtype} on {held.device}, as the cache began; "
                    f"got {tuple(x.shape)} {x.dtype} on {x.device}"
                )

    def append(self, new: dict[str, torch.Tensor], start: int, valid: torch.Tensor | None) -> None:
        """Add q_len tokens at positions start, start + 1, ...; ``valid`` (batch, q_len) False marks padding."""
        q_len = new["k"].shape[2]
        begin, end = self.used, self.used + q_len
        self.make_ready(start, q_len)
        for name, buffer in self.buffers.items():
            slots = buffer[:, :, begin:end]
            slots.copy_(new[name]) if name in new else slots.zero_()
        if valid is not None:
            self.positions[:, begin:end].masked_fill_(~valid, -1)
        self._use(q_len)

    def append_one(self, new: dict[str, torch.Tensor], start: int, slot: torch.Tensor) -> None:
        """``append`` of one token that is no padding; ``slot`` (1,) int64 holds ``used``. What the device does depends
        on no number of the host.
        """
        self.make_ready(start, 1)
        for name, buffer in self.buffers.items():
            buffer.index_copy_(2, slot, new[name]) if name in new else buffer.index_fill_(2, slot, 0)
        self._use(1)

    def make_ready(self, start: int, tokens: int) -> None:
        """Room for ``tokens`` more at positions start, start + 1, ...; nothing to do for most decode steps."""
        if self.used + tokens > self.shape[2]:
            self._resize(self.used + tokens)
        if self._ready != start:
            waiting = self.positions[:, self.used :]
            waiting.copy_(torch.arange(start, start + waiting.shape[1], dtype=torch.int32, device=waiting.device))
            self._ready = start

    def grow(self, limit: int) -> bool:
        """Room for more than the next token where there is none, up to ``limit`` slots; whether there was none."""
        if self.used < self.shape[2]:
            return False
        self._resize(min(limit, self.used + max(GROWTH, self.used // 8)))
        return True

    def _use(self, tokens: int) -> None:
        self.used += tokens
        assert self._ready is not None
        self._ready += tokens

    def follow(self) -> None:
        """The host's part of ``append_one``: a replay has done the rest."""
        self._use(1)

    def _resize(self, capacity: int) -> None:
        pad = capacity - self.shape[2]
        for name, buffer in self.buffers.items():
            grown = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
            grown[:, :, : self.used] = buffer[:, :, : self.used]
            self.buffers[name] = grown
        self.positions = F.pad(self.positions, (0, pad), value=-1)
        self._ready = None

    def leaving(self, window: int, num_sinks: int) -> tuple[int, torch.Tensor]:
        """How many of the oldest slots fall out of a window of ``window`` tokens, and which of those are sinks.

        Returns (outside, sink) with sink (batch, outside) bool: the first ``num_sinks`` tokens of each sequence.
        """
        outside = max(self.used - window, 0)
        valid = self.positions[:, :outside] >= 0
        return outside, valid & (valid.cumsum(1) <= num_sinks)

    def drop(self, outside: int, sink: torch.Tensor, num_sinks: int, capacity: int) -> None:
        """Forget the oldest ``outside`` slots except the sinks, which move to the front; reallocate to ``capacity``."""
        order = torch.argsort((~sink).to(torch.int8), dim=1, stable=True)[:, :num_sinks]  # sinks first, oldest first
        is_sink = sink.gather(1, order)
        if order.shape[1] < num_sinks:  # fewer slots fell out than there are sinks
            pad = (0, num_sinks - order.shape[1])
            order, is_sink = F.pad(order, pad), F.pad(is_sink, pad)
        kept = num_sinks + self.used - outside
        capacity = max(capacity, kept)
        for name, buffer in self.buffers.items():
            index = order[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
            fresh = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
            fresh[:, :, :num_sinks] = buffer.gather(2, index)
            fresh[:, :, num_sinks:kept] = buffer[:, :, outside : self.used]
            self.buffers[name] = fresh
        positions = self.positions.new_full((self.positions.shape[0], capacity), -1)
        positions[:, :num_sinks] = torch.where(is_sink, self.positions.gather(1, order), -1)
        positions[:, num_sinks:kept] = self.positions[:, outside : self.used]
        self.positions, self.used, self.sink_slots, self._ready = positions, kept, num_sinks, None

    def crop(self, length: int, removed: int, capacity: int) -> None:
        """Forget the ``removed`` newest slots and whatever else is at positions >= length; shrink towards
        ``capacity``."""
        self.used = max(self.used - removed, self.sink_slots)
        self.positions[:, self.used :] = -1
        self._ready = None
        self.positions.masked_fill_(self.positions >= length, -1)
        capacity = max(capacity, self.used)
        if capacity < self.shape[2]:
            self.buffers = {name: x[:, :, :capacity].clone() for name, x in self.buffers.items()}
            self.positions = self.positions[:, :capacity].clone()

    def index_select(self, index: torch.Tensor) -> None:
        """Make row i a copy of the old row index[i]."""
        self.buffers = {name: x.index_select(0, index) for name, x in self.buffers.items()}
        self.positions = self.positions.index_select(0, index)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name."""
        return {f"window.{name}": x for name, x in self.buffers.items()} | {"window_positions": self.positions}
