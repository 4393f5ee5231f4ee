"""One layer of the cache: a dense window, a paged store, and what the policy must remember."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from smartkv_ext import ops
from smartkv_ext.gates import LayerBasis

from .clock import POSITION, StepClock
from .config import KEY_SCORE, CacheConfig
from .meter import RECEIVED, RECENT, AttentionMeter
from .store import PagedStore
from .turning import measure_queries
from .window import DenseWindow

OWN_BASIS = LayerBasis()
MAX_DEFERRED = 8  # tokens of a forward that may wait for its end: fewer than any window, so they are not packed before


class SmartKVLayer(CacheLayerMixin):
    """Implements the layer protocol of transformers; compression itself is in compress.py."""

    is_compileable = False  # generate() must not trace the packing steps; see docs/design/transformers.md
    is_croppable = True
    supports_early_init = False

    # Absent until the first keys tell their shape (is_initialized).
    window: DenseWindow
    store: PagedStore
    meter: AttentionMeter
    _rows: torch.Tensor  # row_tokens without the newest ``_uncounted``

    def __init__(self, config: CacheConfig, layer_idx: int, clock: StepClock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.config, self.layer_idx, self.clock = config, layer_idx, clock
        self.rewrites = 0  # times that tokens went, or rows changed, in another way than by packing
        self.sliding_window = config.geometry.sliding_windows[layer_idx]
        self.is_sliding = self.sliding_window > 0
        self._clear()

    def _clear(self) -> None:
        self.rewrites += 1
        self.is_initialized = False
        self.seen = 0  # logical length: every token ever given, padding included
        self._uncounted = 0
        for name in ("window", "store", "meter", "_rows"):
            self.__dict__.pop(name, None)
        self.state: dict[str, torch.Tensor] = {}  # of the policy
        self.queries: torch.Tensor | None = None  # newest queries, for policies that ask for them
        self.head_offset = 0
        self.capacity = 0
        self.query_keep = 0  # newest queries to remember between packings
        self.softmax_scale = 0.0
        self.recent_count = 0  # queries behind the meter's "recent" sums
        self.record_past = False  # lossy steps wait until crop() commits (assisted decoding)
        self.uncommitted = False  # while it is set: a forward that no crop() has followed yet
        self.lost_until = -1  # positions up to here have left the sliding window and are gone
        self.arrived: tuple[torch.Tensor, torch.Tensor] | None = None  # pre-RoPE keys and values still to be scored

    @property
    def row_tokens(self) -> torch.Tensor:
        """(batch,) int64: tokens of each sequence that are not padding; counted on the host between those that ask."""
        if self._uncounted:
            self._rows += self._uncounted
            self._uncounted = 0
        return self._rows

    @row_tokens.setter
    def row_tokens(self, counts: torch.Tensor) -> None:
        self._rows, self._uncounted = counts, 0

    @property
    def basis(self) -> LayerBasis:
        """The basis in which window and store hold keys."""
        found, heads = self.config.key_basis, self.window.shape[1]
        return OWN_BASIS if found is None else found.of_layer(self.layer_idx, self.device, self.head_offset, heads)

    # -- transformers protocol -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate for the shape, dtype and device of the first keys (batch, num_kv_heads, q_len, head_dim)."""
        batch, heads, q_len, head_dim = key_states.shape
        if head_dim != self.config.geometry.head_dim:
            raise ValueError(f"key_states must have head_dim {self.config.geometry.head_dim}; got {head_dim}")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.config.check_budget(self.dtype.itemsize, batch)
        # Slots in use at which the oldest are packed. Until then the window grows token by token, so that a short
        # context holds no more than a full cache.
        self.capacity = self.config.first_capacity(self.seen + q_len, batch, heads, self.dtype.itemsize)
        self.query_keep = self.config.decode_queries(self.seen + q_len, batch, heads, self.dtype.itemsize)
        shape = (batch, heads, 0, head_dim)
        self.window = DenseWindow(self.config.buffers, shape, self.dtype, self.device, self.config.sums)
        self.store = PagedStore(self.config.quant, batch, heads, head_dim, self.dtype, self.device)
        self.meter = AttentionMeter(self.config.policy, self.store)
        self.row_tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def begin(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Before new keys and values (batch, num_kv_heads, q_len, head_dim) come: allocate, or refuse their shape."""
        if not self.is_initialized:
            with torch.inference_mode(False):  # the cache outlives an inference-mode prefill
                self.lazy_initialization(key_states, value_states)
        self.window.check(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new keys and values as they are: the attention function owns append, attend and compress."""
        self.begin(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        """Logical length, never the number of tokens kept: transformers derives positions and masks from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """(length of the mask, offset): masks are built in logical coordinates."""
        q_len = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + q_len, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first token."""
        return self.window.shape[0] if self.is_initialized else -1

    max_batch_size = batch_size

    def reset(self) -> None:
        """Forget everything, memory too."""
        self._clear()

    def activate_past_recording(self) -> None:
        """Assisted decoding: hold lossy steps until crop() says what is kept, or two forwards have none between."""
        self.record_past, self.uncommitted = True, False

    def crop(self, length: int) -> None:
        """Remove the -length newest tokens (length <= 0), or keep the first ``length`` (older transformers)."""
        new = length if length > 0 else self.seen + length
        self.uncommitted, self.arrived = False, None
        if not self.is_initialized or new >= self.seen:
            return
        self.check_crop(new)
        self.rewrites += 1
        if new == 0:
            record_past, self.uncommitted = self.record_past, False
            self._clear()
            self.record_past = record_past
            return
        count = self.seen - new
        padding = self.window.held_positions()[:, -count:] < 0
        # Padding that was dropped when its neighbours were packed is not known any more: never count below zero.
        self.row_tokens = (self.row_tokens - (count - padding.sum(1))).clamp(min=0)
        self.window.crop(new, count, 0 if self.store.is_empty else self.capacity)
        self.config.policy.crop(self.state, new)
        if not self.store.is_empty:
            packed = self.store.positions()
            if bool((packed >= new).any()):
                self._settle_meter()  # closing holes moves records away from their sums
                tiers = torch.arange(packed.shape[2], dtype=torch.int8, device=self.device)
                self.store.update(torch.where(packed < new, tiers[:, None], -1).to(torch.int8), None)
                self.meter.restart(self.store)
        if self.queries is not None:
            self.queries = self.queries[:, :, : max(self.queries.shape[2] - (self.seen - new), 0)]
        self.seen = new

    def check_crop(self, new: int) -> None:
        """Raise ValueError if the layer cannot go back to its first ``new`` tokens; changes nothing."""
        if new < 0:
            raise ValueError(f"crop must leave at least 0 of {self.seen} tokens; got {new}")
        if self.sliding_window and 0 < new < self.seen and new - self.sliding_window < self.lost_until:
            raise ValueError(
                f"crop to {new} tokens needs positions from {new - self.sliding_window + 1} on; layer {self.layer_idx} "
                f"slides over {self.sliding_window} tokens and has forgotten those up to {self.lost_until}"
            )

    def index_select(self, index: torch.Tensor) -> None:
        """Make row i a copy of the old row index[i]."""
        if not self.is_initialized:
            return
        index = index.to(self.device)
        if len(index) > self.batch_size:
            self.config.check_budget(self.dtype.itemsize, len(index))
            # More sequences share a budget in bytes: pack at the next step.
            self.capacity = self.capacity if self.config.budget.num_bytes is None else 0
        if torch.equal(index, torch.arange(self.batch_size, device=self.device)):
            return
        self.rewrites += 1
        self.window.index_select(index)
        self.meter.index_select(index, self.store)
        self.row_tokens = self.row_tokens.index_select(0, index)
        self.state = {name: x.index_select(0, index) for name, x in self.state.items()}
        if self.queries is not None:
            self.queries = self.queries.index_select(0, index)

    reorder_cache = index_select  # type: ignore[assignment]
    batch_select_indices = index_select

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.is_initialized:
            self.index_select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def offload(self) -> None:
        """Not supported: the compressed cache is small enough to stay."""
        raise NotImplementedError("SmartKVCache does not support offloading")

    prefetch = offload

    # -- attention -------------------------------------------------------------------------------------------------

    def append(
        self, k: torch.Tensor, v: torch.Tensor, pre_rope: torch.Tensor | None, valid: torch.Tensor | None
    ) -> None:
        """Add new tokens to the window.

        k, v and, if the policy needs it, pre_rope (batch, num_kv_heads, q_len, head_dim); valid (batch, q_len) bool
        or None."""
        if self.record_past and self.uncommitted:
            self.record_past = False
        self.uncommitted = self.record_past
        new = {"k": self.basis.keys(k), "v": v}
        if self.config.policy.needs_pre_rope_keys:
            if pre_rope is None:
                raise RuntimeError(f"policy {self.config.policy.name!r} needs pre-RoPE keys and the model gave none")
            new["pre_rope"] = pre_rope
        if k.shape[2] == 1 and valid is None:
            self.window.append_one(new, self.seen, self._slot(self.window.used))
        else:
            self.window.append(new, self.seen, valid)
        if self.config.policy.scores_keys:
            self._arrive(pre_rope, v)
        self.seen += k.shape[2]
        if valid is None:
            self._uncounted += k.shape[2]
        else:
            self.row_tokens += valid.sum(1)

    def _slot(self, slot: int) -> torch.Tensor:
        """(1,) int64 of a slot of the window."""
        return self.clock.entry(self.device, 1 + POSITION + self.layer_idx, slot)

    def _arrive(self, pre_rope: torch.Tensor | None, v: torch.Tensor) -> None:
        """Score new tokens, or leave that to the end of the forward if they are few: then all layers are one launch."""
        if pre_rope is None:
            raise RuntimeError(f"policy {self.config.policy.name!r} scores pre-RoPE keys and the model gave none")
        self.arrived = pre_rope, v
        if v.shape[2] > MAX_DEFERRED:
            scores = self.config.policy.score_keys([pre_rope], [v], self.layer_idx, self.head_offset)
            self.write_key_scores(scores[0])

    def write_key_scores(self, scores: torch.Tensor) -> None:
        """scores (batch, num_kv_heads, q_len) of the newest tokens."""
        if scores.shape[2] == 1:
            self.window.buffers[KEY_SCORE].index_copy_(2, self._slot(self.window.used - 1), scores[..., None])
        else:
            self.window.held(KEY_SCORE)[:, :, -scores.shape[2] :, 0] = scores
        self.arrived = None

    def attend(
        self, q: torch.Tensor, softmax_scale: float, return_mass: bool = False, q_start: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attention of q_len queries (default: the newest) over everything held; see ops.decode_attention. The
        log-sum-exp is that of scores in the basis."""
        buffers, store = self.window.buffers, self.store
        start = self.clock.entry(self.device, POSITION, self.seen - q.shape[2] if q_start is None else q_start)
        return ops.decode_attention(
            self.basis.queries(q), store.pools, store.block_table, store.cache_seqlens, store.k_mean,
            buffers["k"], buffers["v"], self.window.positions,
            start, self.config.quant.tiers, self.config.quant.levels, softmax_scale,
            self.sliding_window, return_mass, self.config.precision, store.k_turns, store.turn_steps, store.k_weights,
        )  # fmt: skip

    def step_kind(self) -> bool | None:
        """Whether the next token's query counts in "recent" sums; None where its step packs or changes a shape."""
        if not self.is_initialized or self.record_past or self.window.used + 1 >= self.capacity:
            return None
        if self.window.grow(self.capacity):  # the buffers are others now
            return None
        keep = self._remembered(self.window.used + 1)
        if keep and (self.queries is None or self.queries.shape[2] != keep):
            return None
        return self.window.used + 1 > self.capacity - self.config.policy.recent_queries

    def make_ready(self) -> None:
        """What the device must know before the next token comes."""
        self.window.make_ready(self.seen, 1)
        self._slot(self.window.used)
        self.clock.entry(self.device, POSITION, self.seen)

    def follow(self) -> None:
        """The host's part of a one-token step."""
        if self.step_kind():
            self.recent_count += 1
        self.window.follow()
        self.seen += 1
        self._uncounted += 1

    def _remembered(self, used: int) -> int:
        """How many queries are kept at ``used`` slots: none while the first packing is further away than they reach."""
        return 0 if self.store.is_empty and used + self.query_keep < self.capacity else self.query_keep

    def remember_queries(self, q: torch.Tensor) -> None:
        """Keep the newest queries that the policy asked for."""
        measure_queries(self, q)
        policy, keep = self.config.policy, self._remembered(self.window.used)
        if self.is_due():  # packing lets go of all but these
            keep = max(keep, min(q.shape[2], policy.prefill_queries))
        if keep:
            past = (q if self.queries is None else torch.cat([self.queries, q], 2))[:, :, -keep:]
            if self.queries is not None and self.queries.shape == past.shape:
                self.queries.copy_(past)  # in place: a replayed step finds it where it was
            else:
                self.queries = past.clone()

    def attend_new(self, q: torch.Tensor, softmax_scale: float) -> torch.Tensor:
        """(batch, num_heads, q_len, head_dim) attention of the newest queries; measured if the policy accumulates."""
        if not self.meter.names:
            return self.attend(q, softmax_scale)[0]
        out = []
        for part, q_start, names in self._measured_parts(q):
            o, _, mass, window_mass = self.attend(part, softmax_scale, True, q_start)
            out.append(o)
            for name in names:
                self.meter.add(name, mass)
                self.window.buffers[name][..., 0] += window_mass
        return out[0] if len(out) == 1 else torch.cat(out, 2)

    def measure_prefill(self, q: torch.Tensor, softmax_scale: float) -> None:
        """What attend_new measures, for the first tokens, whose attention another function has computed."""
        for part, q_start, names in self._measured_parts(q) if self.meter.names else ():
            q, keys, positions = self.basis.queries(part), self.window.held("k"), self.window.held_positions()
            mass = ops.attention_mass(q, keys, positions, q_start, softmax_scale, self.sliding_window)
            for name in names:
                self.window.held(name)[..., 0] += mass

    def _measured_parts(self, q: torch.Tensor) -> Iterator[tuple[torch.Tensor, int, tuple[str, ...]]]:
        """(queries, position of the first, sums that they count in): "recent" takes the last ``recent_queries`` before
        the next packing, which is due when the window has ``capacity`` tokens."""
        q_len, most = q.shape[2], self.config.policy.recent_queries
        until_due = max(self.capacity - self.window.used, 0)
        newest = min(max(most - until_due, 0), q_len)
        start = self.seen - q_len
        if newest < q_len:
            yield q[:, :, : q_len - newest], start, (RECEIVED,)
        if newest:
            if newest == most:
                self._forget_recent()
            self.recent_count += newest
            yield q[:, :, q_len - newest :], start + q_len - newest, (RECEIVED, RECENT)

    def _forget_recent(self) -> None:
        self.recent_count = 0
        if RECENT in self.meter.names:
            self.window.buffers[RECENT].zero_()
            self.meter.sums[RECENT].zero_()

    def recent_scale(self) -> float:
        """What a "recent" sum must be multiplied by to stand for ``recent_queries`` queries."""
        return self.config.policy.recent_queries / max(self.recent_count, 1)

    def received_by_records(self) -> torch.Tensor:
        """(batch, num_kv_heads, num_tiers, slots) what records carry, and the attention received since."""
        return self.store.scores() + self.meter.spread(RECEIVED, self.store)

    def _settle_meter(self) -> None:
        """Let records carry what they have received."""
        if not self.meter.names:
            return
        stored, received = self.store.scores().flatten(2), self.received_by_records().flatten(2)
        carried = self.config.policy.carried(stored, received, self.layer_idx, self.head_offset, stored)
        self.store.write_scores(carried.view_as(self.store.scores()))
        self._forget_recent()

    def after_packing(self) -> None:
        """Start to measure anew: the records carry what they had received."""
        self._forget_recent()
        self.meter.restart(self.store)

    def is_due(self) -> bool:
        """True when enough tokens have gathered beyond the window to be packed."""
        return not self.record_past and self.window.used >= self.capacity

    def plan(self) -> tuple[int, int]:
        """(window, block) under the present budget, as for ``CacheConfig.dense_sizes``, and how many queries are
        remembered from now on. The rows of a batch share them: they are those of a sequence of average length."""
        config, (batch, heads), itemsize = self.config, self.window.shape[:2], self.dtype.itemsize
        tokens = int(self.row_tokens.sum()) // batch
        self.query_keep = config.decode_queries(tokens, batch, heads, itemsize)
        return config.dense_sizes(config.layer_budget(tokens, batch, heads, itemsize), heads, itemsize)
