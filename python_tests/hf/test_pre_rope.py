"""Keys before RoPE reach the policy, exactly, in the right order and for the right tokens."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hf.tiny import KINDS, generate, prompts, tiny

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.policies import Policy

SEEN = {}


@dataclass(frozen=True)
class Spy(Policy):
    """Scores by position and keeps what it was shown."""

    name: ClassVar[str] = "spy"
    needs_pre_rope_keys: ClassVar[bool] = True

    def score(self, view):
        SEEN.setdefault(view.layer_idx, []).append(
            (view.pre_rope_keys.clone(), view.keys.clone(), view.positions.clone())
        )
        return view.positions[:, None].float().expand(view.keys.shape[:3])


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_pre_rope_keys_rotate_into_the_keys(kind, copied):
    SEEN.clear()
    model = tiny(kind)
    ids, mask = prompts(2)
    with smartkv_ext.patch(model):
        model = copy.deepcopy(model) if copied else model
        cache = SmartKVCache(model.config, budget=0.9, policy=Spy(), window=24, min_tokens=0)
        generate(model, ids, mask, cache, new=40)
    assert set(SEEN) == set(range(4)) and len(SEEN[0]) > 1
    offset = (mask == 0).sum(1)  # RoPE counts from the first real token, positions from the first token
    for calls in SEEN.values():
        for pre, keys, positions in calls:
            rope = (positions - offset[:, None]).clamp(min=0)
            cos, sin = model.model.rotary_emb(keys, rope)
            valid = (positions >= 0)[:, None, :, None]
            difference = torch.where(valid, rotated(pre, cos[:, None], sin[:, None]) - keys, 0.0)
            assert difference.abs().max() < 1e-4
            assert torch.where(valid, pre - keys, 0.0).abs().max() > 0.1
    assert not any("_smartkv_pre_rope" in m.__dict__ for m in model.modules()), "keys outlive the call"
    assert cache.report().total_bytes <= 0.9 * cache.report().full_bytes or cache.report().full_bytes < 200_000
