"""A decode step that packs nothing reads no value back to the host, and sends none: on a GPU either would wait for all
work queued before."""

import contextlib

import pytest
import torch
from gates.make_gates import usable
from hf.tiny import prompts, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import smartkv_ext
from smartkv_ext import SmartKVCache
from smartkv_ext.cache.store import PagedStore
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import POLICIES

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "repeat_interleave"}


class NoHostTraffic(TorchDispatchMode):
    """Raises where the size of a result, or Python, depends on a value, and where a tensor is made of Python values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, f"{func} reads values"
        assert name != "lift_fresh", "a tensor is made of values on the host"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), f"{func} counts a mask"
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_traffic():
    x = torch.ones(3)
    for bad in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 0], lambda: torch.tensor([1.0])):
        with NoHostTraffic(), pytest.raises(AssertionError):
            bad()


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"map"}))
def test_no_host_traffic(name):
    model = tiny("qwen2", num_hidden_layers=2)
    ids, _ = prompts(1, 230)
    watched = 0
    with smartkv_ext.patch(model), torch.inference_mode():
        cache = SmartKVCache(model.config, budget=0.5, policy=usable(name, model), window=32, min_tokens=0)
        model(ids[:, :200], **cache_kwargs(cache))
        assert any(layer.store.cache_seqlens.sum() > 0 for layer in cache.layers)
        for i in range(200, 230):
            packs = any(layer.window.used + 1 >= layer.capacity for layer in cache.layers)
            with contextlib.nullcontext() if packs else NoHostTraffic():
                model(ids[:, i : i + 1], **cache_kwargs(cache))
            watched += not packs
    assert watched >= 10


def test_the_store_asks_twice(monkeypatch):
    """For as many numbers as it allocates by, once before it writes and once after: no mask is counted on the way."""
    model = tiny("qwen2", num_hidden_layers=1)
    ids, _ = prompts(2, 230)
    asked = []
    plain, counts = PagedStore.update, PagedStore._counts

    def update(self, *args):
        with NoHostTraffic():  # which does not see tolist()
            return plain(self, *args)

    monkeypatch.setattr(PagedStore, "update", update)
    monkeypatch.setattr(PagedStore, "_counts", lambda self, pages: asked.append(0) or counts(self, pages))
    with smartkv_ext.patch(model), torch.inference_mode():
        cache = SmartKVCache(model.config, budget=0.7, policy="keydiff", window=32, min_tokens=0)
        model(ids[:, :200], **cache_kwargs(cache))
        assert len(asked) == 2
        for i in range(200, 230):
            model(ids[:, i : i + 1], **cache_kwargs(cache))
    assert len(asked) >= 6 and len(asked) % 2 == 0
    assert (cache.layers[0].store.cache_seqlens.sum((0, 1)) > 0).sum() >= 2, "several tiers"
