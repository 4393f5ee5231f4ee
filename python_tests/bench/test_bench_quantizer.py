"""The quantisers of bench.quantizer on captures of a tiny model."""

from dataclasses import replace

import pytest
import torch

from bench.quantizer import attend, calibrate, errors, layers
from bench.quantizers import KEYS, VALUES, is_offered, page_means, refined
from python_tests.hf.tiny import prompts, tiny
from smartkv_ext import ops
from smartkv_ext.eval.recording import record
from smartkv_ext.gates import LayerBasis
from smartkv_ext.hf import patch


@pytest.fixture(scope="module")
def captured():
    model = tiny("qwen2")
    with torch.no_grad():
        with patch(model):
            recordings = [record(model, prompts(1, 320, seed=seed)[0]) for seed in (1, 2)]
        return layers(model, *recordings, every=2)


def test_eight_bits_are_nearly_exact(captured):
    """Every way back is the way there: rotation, map, means, RoPE."""
    for row in errors(captured, 8, queries=32, sinks=0):
        if "g64" not in row["method"]:
            assert row["error"] < 0.05, row


def test_true_bits(captured):
    rows = {(r["of"], r["method"]): r["true bits"] for r in errors(captured[:1], 4, 16, 0)}
    assert rows["keys", "ours: mean, H, codebook"] == rows["values", "ours: H, codebook"] == 4 + 16 / 64
    assert rows["keys", "KIVI, per channel g32"] == rows["keys", "per token g32"] == 5
    assert rows["keys", "page mean, H, codebook"] == pytest.approx(4.25 + 8 / 64 + 16 / (64 * 64))
    if is_offered("hqq g64", 4):
        assert rows["keys", "hqq g64"] == pytest.approx(4 + 2 * 16 / 64, abs=0.6)


def test_a_mean_shift_takes_key_biases_away(captured):
    biased = [replace(layer, k=layer.k + 10 * torch.randn(1, 2, 1, 64)) for layer in captured]
    rows = {r["method"]: r["error"] for r in errors(biased, 4, 32, 0) if r["of"] == "keys"}
    assert rows["ours: mean, H, codebook"] < 0.5 * rows["TurboQuant-style"]


def test_ours_is_what_the_op_stores(captured):
    """The bench's quantiser and quantize_kv give the same values."""
    layer = captured[0]
    k, v = (x[:, :, :128].contiguous() for x in (layer.k, layer.v))
    mean, positions = k.mean(2), torch.arange(128, dtype=torch.int32).expand(1, 2, 128).contiguous()
    pages = ops.quantize_kv(k, v, mean, positions, torch.zeros(1, 2, 128), 3, "gaussian")
    stored_k, stored_v = ops.dequantize_kv(pages, mean, 64, 3, "gaussian", torch.float32)
    layer.k, layer.v = k, v
    torch.testing.assert_close(stored_k, KEYS["ours: mean, H, codebook"](layer, 3)[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(stored_v, VALUES["ours: H, codebook"](layer, 3)[0], atol=2e-3, rtol=2e-3)


def test_pieces():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 150, 64) + 3
    means, extra = page_means(x)
    assert means.shape == x.shape and extra < 0.2
    assert (means[:, :, :64] - x[:, :, :64].mean(2, keepdim=True)).abs().max() < 0.03
    q = torch.randn(1, 4, 8, 64)
    out = attend(q, x, x)
    last = (q[0, 0, -1] @ x[0, 0].T * 64**-0.5).softmax(-1) @ x[0, 0]
    torch.testing.assert_close(out[0, 0, -1], last, atol=1e-4, rtol=1e-4)
    y = torch.randn(4, 1, 100, 64)
    from bench.quantizers import codebook

    assert (refined(y, 2)[0] - y).norm() <= (codebook(y, 2)[0] - y).norm()


def test_calibrated_map_balances_queries_and_keys():
    """A Ck A^T and A^-T Cq A^-1 are equal up to a factor: noise meets queries where keys are large too."""
    torch.manual_seed(0)
    shape = torch.randn(64, 64)
    layer = type("L", (), {"k": torch.randn(1, 1, 4000, 64) @ shape, "q": torch.randn(1, 2, 4000, 64) * 2})
    a = calibrate(layer, torch.zeros(1, 64), LayerBasis()).key_map[0].double()
    k, q = layer.k[0, 0].double(), layer.q[0].flatten(0, 1).double()
    keys = a @ (k.T @ k / 4000) @ a.T
    queries = torch.linalg.inv(a).T @ (q.T @ q / 8000) @ torch.linalg.inv(a)
    ratio = keys.norm() / queries.norm()
    assert (keys / ratio - queries).norm() / queries.norm() < 0.1
