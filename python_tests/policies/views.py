"""Views for policies, and attention by the textbook."""

import torch

from smartkv_ext.policies import RecordView, TokenView


def make_view(n=40, q_len=32, batch=2, heads=2, groups=3, seed=0, state=None, start=0, rope=False):
    """Random tokens; row 1 has five padding tokens in front, whose keys are NaN."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch, heads, n, 64, generator=generator)
    positions = torch.arange(start, start + n, dtype=torch.int32).repeat(batch, 1)
    positions[1, :5] = -1
    keys[1, :, :5] = torch.nan
    row_tokens = torch.full((batch,), start + n)
    row_tokens[1] -= 5
    values = torch.randn(batch, heads, n, 64, generator=generator)
    received, recent = (
        torch.rand(2, batch, heads, n, generator=generator) * torch.tensor([3.0, 1.0])[:, None, None, None]
    )
    key_scores = torch.randn(batch, heads, n, generator=generator)
    key_scores[1, :, :5] = torch.nan
    return TokenView(
        key_scores=key_scores, layer_idx=1, num_layers=4, keys=keys, values=values,
        pre_rope_keys=None, positions=positions,
        queries=torch.randn(batch, heads * groups, q_len, 64, generator=generator) if q_len else None,
        lse=None, q_start=start + n - q_len, softmax_scale=0.125, sliding_window=0, head_offset=0,
        state={} if state is None else state, row_tokens=row_tokens, received=received, recent=recent,
        inv_freq=10000.0 ** (-torch.arange(0, 64, 2) / 64) if rope else None,
    )  # fmt: skip


def make_records(n=30, batch=2, heads=2, seed=0, seen=60, **fields):
    """Random records, the last four slots empty."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randperm(seen - 10, generator=generator)[:n] for _ in range(batch * heads)])
    positions = positions.view(batch, heads, n).int()
    positions[..., -4:] = -1
    shape = (batch, heads, n)
    norms = torch.rand(shape, generator=generator) * 4
    made = dict(
        layer_idx=2, num_layers=4, stored=torch.rand(shape, generator=generator),
        received=torch.rand(shape, generator=generator) * 3, recent=torch.rand(shape, generator=generator),
        mass=torch.rand(shape, generator=generator), num_queries=16, positions=positions, seen=seen,
        row_tokens=torch.tensor([seen, seen - 5])[:batch], head_offset=0, key_norms=lambda: norms, state={},
    )  # fmt: skip
    return RecordView(**(made | fields))


def valid(view):
    """(batch, num_kv_heads, n) bool."""
    return (view.positions >= 0)[:, None].expand(view.keys.shape[:3])


def attention(view, queries):
    """(batch, num_heads, q, n) probabilities of the newest queries, by the textbook."""
    q = view.queries[:, :, -queries:]
    groups = q.shape[1] // view.keys.shape[1]
    keys = torch.nan_to_num(view.keys).repeat_interleave(groups, 1)
    scores = q @ keys.transpose(2, 3) * view.softmax_scale
    where = torch.arange(view.q_start + view.queries.shape[2] - queries, view.q_start + view.queries.shape[2])
    allowed = (view.positions[:, None, None] >= 0) & (view.positions[:, None, None] <= where[:, None])
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)
