"""A token's way from the window into a tier, or out: score, decide, pack. The only place where anything is lost."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial

import torch

from smartkv_ext import ops
from smartkv_ext.policies import RecordView, TokenView
from smartkv_ext.reference.layout import PAGE_SIZE, tier_name

from .config import KEY_SCORE, UNLIMITED
from .layer import SmartKVLayer
from .meter import RECEIVED, RECENT, page_meter_bytes
from .turning import measure_means, most_mean_bytes

EVICT_NEVER = (
    1e6  # distortion of losing a token under a policy that keeps all: a first page always wins over a better tier
)


@dataclass
class _Candidates:
    """Records and leaving tokens of one layer, by position. n = slots of the store + tokens that leave the window."""

    scores: (
        torch.Tensor
    )  # (batch, num_kv_heads, n) float32, -inf: gone (empty slot, padding, out of the sliding window)
    carried: torch.Tensor  # (batch, num_kv_heads, outside) float32: what leaving tokens carry if they are packed
    positions: torch.Tensor  # (batch, num_kv_heads, n) int32
    current: torch.Tensor  # (batch, num_kv_heads, n) int8, as for ops.select_kv
    outside: int  # how many of the n are leaving tokens: the last ones
    sink: torch.Tensor  # (batch, outside) bool


def compress(layers: list[SmartKVLayer], softmax_scale: float) -> None:
    """Pack the tokens that have left the windows of ``layers`` and hold the budget, demoting and evicting as needed.

    With scope "global" the layers must be all layers of the model, at the same length; else any subset.
    """
    sizes = [layer.plan() for layer in layers]
    candidates = [_collect(layer, window, softmax_scale) for layer, (window, _) in zip(layers, sizes, strict=True)]
    scope = layers[0].config.scope
    if scope == "global":
        tiers = _decide_shared(layers, candidates, sizes)
    elif scope == "layer":
        tiers = [_decide_shared([x], [c], [s])[0] for x, c, s in zip(layers, candidates, sizes, strict=True)]
    else:
        tiers = [_decide_per_head(x, c, s) for x, c, s in zip(layers, candidates, sizes, strict=True)]
    for layer, found, chosen, size in zip(layers, candidates, tiers, sizes, strict=True):
        _apply(layer, found, chosen, size)


# -- score ---------------------------------------------------------------------------------------------------------


def _collect(layer: SmartKVLayer, window: int, softmax_scale: float) -> _Candidates:
    policy = layer.config.policy
    outside, sink = layer.window.leaving(window, layer.config.num_sinks)
    if layer.store.is_empty and layer.config.quant.mean_shift:
        layer.store.set_means(measure_means(layer))
    positions, old_positions = layer.window.held_positions(), layer.store.positions()
    old_scores, lse = _refresh(layer, softmax_scale)
    view = _token_view(layer, softmax_scale, lse)
    everything = policy.score(view).float()
    scores = everything[:, :, :outside]
    carried = policy.carried(everything, view.received, layer.layer_idx, layer.head_offset, view.key_scores)
    carried, gone = carried[:, :, :outside], (positions[:, :outside] < 0) | sink
    if layer.sliding_window:
        horizon = layer.seen - layer.sliding_window  # the next query sees positions above this
        layer.lost_until = max(layer.lost_until, horizon)
        gone = gone | (positions[:, :outside] <= horizon)
        old_scores = old_scores.masked_fill(old_positions <= horizon, -torch.inf)
    largest = torch.finfo(torch.float32).max
    scores = scores.nan_to_num(nan=-largest, posinf=largest, neginf=-torch.inf).masked_fill(gone[:, None], -torch.inf)

    shape = old_scores.shape
    tier = torch.arange(shape[2], dtype=torch.int8, device=scores.device)[:, None].expand(shape).flatten(2)
    fresh = torch.full_like(scores, shape[2], dtype=torch.int8)
    current = torch.cat([tier, fresh], 2)
    all_scores = torch.cat([old_scores.flatten(2), scores], 2)
    return _Candidates(
        scores=all_scores,
        carried=carried,
        positions=torch.cat([old_positions.flatten(2), positions[:, None, :outside].expand_as(scores)], 2),
        current=torch.where(all_scores == -torch.inf, -1, current).to(torch.int8),
        outside=outside,
        sink=sink,
    )


def _refresh(layer: SmartKVLayer, softmax_scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What packed records are worth now (batch, num_kv_heads, num_tiers, slots), -inf in empty slots; and the
    log-sum-exp of the remembered queries over all tokens. Writes what the records carry on.
    """
    policy, store, meter = layer.config.policy, layer.store, layer.meter
    stored, positions = store.scores(), store.positions()
    if store.is_empty:
        return stored, None
    lse, mass = None, None
    if policy.prefill_queries and layer.queries is not None:
        _, lse, mass, _ = layer.attend(layer.queries, softmax_scale, return_mass=True)
        mass = mass.flatten(2)
        lse = layer.basis.model_lse(lse, layer.queries, softmax_scale)
    received = layer.received_by_records() if meter.names else None
    recent = meter.spread(RECENT, store) * layer.recent_scale() if RECENT in meter.names else None
    records = RecordView(
        layer_idx=layer.layer_idx,
        num_layers=layer.config.geometry.num_layers,
        stored=stored.flatten(2),
        received=None if received is None else received.flatten(2),
        recent=None if recent is None else recent.flatten(2),
        mass=mass,
        num_queries=0 if layer.queries is None else layer.queries.shape[2],
        positions=positions.flatten(2),
        seen=layer.seen,
        row_tokens=layer.row_tokens,
        head_offset=layer.head_offset,
        key_norms=partial(_key_norms, layer),
        state=layer.state,
    )
    scores = policy.refresh(records).float()
    if scores is not records.stored or meter.names:
        carried = policy.carried(scores, records.received, layer.layer_idx, layer.head_offset, records.stored)
        store.write_scores(torch.where(positions >= 0, carried.view_as(stored), 0.0))
    return torch.where(positions >= 0, scores.view_as(stored), -torch.inf), lse


def _token_view(layer: SmartKVLayer, softmax_scale: float, lse: torch.Tensor | None) -> TokenView:
    policy, window, inv_freq = layer.config.policy, layer.window, layer.config.inv_freq
    names = layer.meter.names
    return TokenView(
        layer_idx=layer.layer_idx,
        num_layers=layer.config.geometry.num_layers,
        keys=layer.basis.model_keys(window.held("k")),
        values=window.held("v"),
        pre_rope_keys=window.held("pre_rope") if policy.needs_pre_rope_keys else None,
        positions=window.held_positions(),
        queries=layer.queries,
        lse=lse,
        q_start=layer.seen - (0 if layer.queries is None else layer.queries.shape[2]),
        softmax_scale=softmax_scale,
        sliding_window=layer.sliding_window,
        head_offset=layer.head_offset,
        state=layer.state,
        row_tokens=layer.row_tokens,
        received=window.held(RECEIVED)[..., 0] if names else None,
        recent=window.held(RECENT)[..., 0] * layer.recent_scale() if RECENT in names else None,
        inv_freq=torch.tensor(inv_freq, dtype=torch.float32, device=layer.device) if inv_freq else None,
        key_scores=window.held(KEY_SCORE)[..., 0] if policy.scores_keys else None,
    )


def _key_norms(layer: SmartKVLayer) -> torch.Tensor:
    """(batch, num_kv_heads, slots of all tiers) float32 L2 norms of the packed keys as their codes give them."""
    keys = layer.basis.model_keys(layer.store.dequantize()[0])
    norms: torch.Tensor = torch.linalg.vector_norm(keys, dim=-1)
    return norms


# -- decide --------------------------------------------------------------------------------------------------------


def _page_budget(layer: SmartKVLayer, size: tuple[int, int]) -> torch.Tensor:
    """(batch,) int64 bytes that the pages of a layer may take: the budget less everything else that the layer holds."""
    config, store = layer.config, layer.store
    batch, heads = layer.window.shape[:2]
    itemsize = layer.dtype.itemsize
    per_row = [config.layer_budget(n, batch, heads, itemsize) for n in layer.row_tokens.tolist()]
    dense = (config.num_sinks + sum(size)) * (config.dense_token_bytes(heads, itemsize) + 4)
    share = 1.0
    if config.scope != "global":
        share = config.policy.layer_share(layer.layer_idx, config.geometry.num_layers, config.geometry.num_kv_heads)
    # Layers may differ in what turns: where room is shared out, all count the most, so that no share is too large.
    means = store.mean_bytes // batch if share == 1 else most_mean_bytes(layer)
    fixed = config.table_bytes(heads) + means + sum(x.nbytes // batch for x in layer.state.values())
    fixed += layer.query_keep * config.query_bytes(heads, itemsize)
    if per_row[0] >= UNLIMITED:
        return torch.full((batch,), UNLIMITED, dtype=torch.int64, device=layer.device)
    # Every layer has the same dense part; what a policy shares out unevenly is the room for pages.
    rooms = [int(room * share) if room > 0 else room for room in (limit - dense - fixed for limit in per_row)]
    # All rows of a batch share the window's size: what a short row holds beyond its own share, the longer ones give up.
    spare, owed = sum(max(room, 0) for room in rooms), -sum(min(room, 0) for room in rooms)
    # The block table is as wide as the longest list: at worst one head has all pages, of the smallest tier.
    columns = max(rooms) // (store.layouts[0].page_bytes + page_meter_bytes(config.policy)) + 1
    table = 4 * batch * heads * len(config.quant.tiers) * max(columns, 0)
    left = max(spare - owed - table, 0) / max(spare, 1)
    budgets = [int(max(room, 0) * left) for room in rooms]
    return torch.tensor(budgets, dtype=torch.int64, device=layer.device)


def _select(layer: SmartKVLayer, scores: torch.Tensor, current: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
    """scores, current (batch, heads, n), budgets (batch,) -> tiers (batch, heads, n).

    A policy that keeps every token warns where the budget loses some: those that it ranks lowest.
    """
    policy, quant = layer.config.policy, layer.config.quant
    page_bytes = [x.page_bytes + page_meter_bytes(policy) for x in layer.store.layouts]
    evict_distortion = 1.0 if policy.evicts else EVICT_NEVER
    tiers = ops.select_kv(scores, current, budgets, page_bytes, quant.loss, evict_distortion)
    if not policy.evicts and bool(((tiers < 0) & (current >= 0)).any()):
        warnings.warn(
            f"at {tier_name(quant.tiers[0])} bits the budget no longer holds every token, as policy {policy.name!r} "
            "wants: the oldest go. Raise the budget, or choose a policy that evicts",
            stacklevel=2,
        )
    return tiers


def _decide_per_head(layer: SmartKVLayer, found: _Candidates, size: tuple[int, int]) -> torch.Tensor:
    """Where scores compare across heads, the heads of a layer compete for its bytes (AdaKV, Feng et al. 2024): a head
    that needs more tokens holds more. Otherwise every head spends the same.
    """
    shape, heads = found.scores.shape, found.scores.shape[1]
    order = found.positions.argsort(dim=-1, stable=True)  # so that ties go to the newer token
    scores, current = found.scores.gather(-1, order), found.current.gather(-1, order)
    budgets = _page_budget(layer, size)
    policy = layer.config.policy
    if not policy.compares_heads:
        keeping = (current >= 0).any(-1)  # a head that asks for nothing leaves its bytes to the others
        budgets = (budgets // keeping.sum(1).clamp(min=1)).repeat_interleave(heads)
        scores, current = scores.flatten(0, 1)[:, None], current.flatten(0, 1)[:, None]
    elif policy.head_floor:
        page_bytes = layer.store.layouts[0].page_bytes + page_meter_bytes(policy)
        sure = policy.head_floor * PAGE_SIZE * (budgets // heads // page_bytes)
        scores = _with_floor(scores, sure)
    tiers = _select(layer, scores, current, budgets).view(shape)
    return torch.empty_like(found.current).scatter_(-1, order, tiers)


def _with_floor(scores: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
    """Ranks of ``scores`` (batch, heads, n) over all heads, with the best ``sure`` (batch,) of every head above all."""
    place = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    rank = scores.flatten(1).argsort(dim=-1, stable=True).argsort(-1).view_as(scores).float()
    rank = rank + torch.where(place < sure[:, None, None], float(scores[0].numel()), 0.0)
    return rank.masked_fill(scores == -torch.inf, -torch.inf)


def _decide_shared(
    layers: list[SmartKVLayer], found: list[_Candidates], sizes: list[tuple[int, int]]
) -> list[torch.Tensor]:
    """One decision for all heads of all ``layers``: a token is as important as its best rank in any of them.

    Scores of different heads are not comparable, ranks are. All heads hold the same records, since all decisions
    were shared.
    """
    rank: torch.Tensor | None = None
    budgets = _page_budget(layers[0], sizes[0])
    for layer, candidates in zip(layers, found, strict=True):
        order = candidates.positions.argsort(dim=-1, stable=True)
        scores = candidates.scores.gather(-1, order)
        place = scores.argsort(dim=-1, stable=True).argsort(-1).float()
        place = place.masked_fill(scores == -torch.inf, -torch.inf).amax(1)
        rank = place if rank is None else torch.maximum(rank, place)
        budgets = torch.minimum(budgets, _page_budget(layer, sizes[0]))
    assert rank is not None
    out = []
    for layer, candidates in zip(layers, found, strict=True):
        order = candidates.positions.argsort(dim=-1, stable=True)
        current = candidates.current.gather(-1, order)
        alive = torch.where(current[:, 0] >= 0, rank, -torch.inf)
        heads = current.shape[1]
        tiers = _select(layer, alive[:, None], current[:, :1].contiguous(), budgets // heads)
        tiers = tiers.expand_as(candidates.current).contiguous()
        out.append(torch.empty_like(candidates.current).scatter_(-1, order, tiers))
    return out


# -- pack ----------------------------------------------------------------------------------------------------------


def _apply(layer: SmartKVLayer, found: _Candidates, tiers: torch.Tensor, size: tuple[int, int]) -> None:
    """Carry out the decision, then let the window forget what was packed."""
    n = tiers.shape[2]
    slots = n - found.outside
    held, old = layer.store.slot_mask(), tiers[:, :, :slots].reshape(layer.store.slot_mask().shape)
    here = torch.arange(held.shape[2], dtype=torch.int8, device=held.device)[:, None]
    changed, packed = torch.stack([(held & (old != here)).any(), (tiers[:, :, slots:] >= 0).any()]).tolist()
    new = None
    if packed:
        new = {
            "k": layer.window.held("k")[:, :, : found.outside],
            "v": layer.window.held("v")[:, :, : found.outside],
            "positions": found.positions[:, :, slots:].contiguous(),
            "scores": found.carried.contiguous(),
            "tiers": tiers[:, :, slots:].contiguous(),
        }
    if changed or new:
        layer.store.update(old if changed else None, new)
    num_sinks = layer.config.num_sinks
    layer.capacity = num_sinks + sum(size)
    if found.outside:
        layer.window.drop(found.outside, found.sink, num_sinks, layer.capacity)
    layer.after_packing()
    if layer.queries is not None:
        keep = layer.query_keep
        layer.queries = layer.queries[:, :, -keep:].clone() if keep else None
