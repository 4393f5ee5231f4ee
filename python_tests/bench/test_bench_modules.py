"""Every benchmark of an op runs, and its figures fit together. Timings themselves are never judged."""

import importlib
import json
import math
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

import bench.all
import bench.gate_score
import bench.kl
import bench.memory_speed
import bench.output
import bench.timing
from bench.append_kv import append_calls, cache_with_room
from bench.compact_kv import compact_calls, moved_records, random_targets
from bench.operands import Tokens, mixed_cache, ragged_page_counts, uniform_cache
from bench.rivals import attention_ways, dequantize_eagerly, quantize_eagerly, rotation_matrix
from bench.session import Session
from smartkv_ext.reference.layout import TIERS, page_layout, page_positions

FIELDS = {
    "us", "bytes", "gbps", "bandwidth_gbps", "bandwidth_method", "floor_us", "floor_ratio", "rivals_us", "best_torch",
    "speedup_vs_best_torch", "others_cpu",
}  # fmt: skip
HEADS, KV_HEADS, N, D = 4, 2, 200, 64  # N: not a multiple of a page
PAGES = -(-N // 64)
KV = 2 * KV_HEADS * N * D * 2  # bytes of keys and values, bfloat16
PAGE = page_layout(4, D).page_bytes
SIZES = ["--kv-len", N, "--kv-heads", KV_HEADS, "--head-dim", D]

# module -> (arguments, bytes that the docstring promises, other fields)
CASES = {
    "decode_attention": ([*SIZES, "--heads", HEADS, "--bits", 4], KV_HEADS * PAGES * PAGE, {"bits"}),
    "quantize_kv": ([*SIZES], KV + KV_HEADS * PAGES * PAGE, {"input_gbps"}),
    "dequantize_kv": ([*SIZES], KV + KV_HEADS * PAGES * PAGE, {"output_gbps"}),
    "append_kv": (
        [*SIZES, "--new", 10],
        2 * KV_HEADS * 10 * D * 2 + KV_HEADS * 10 * PAGE // 64,
        {"input_gbps"},
    ),
    "attention_mass": ([*SIZES, "--heads", HEADS, "--q-len", 5, "--lse"], KV // 2, {"gflops"}),
    "gate_score": (
        [*SIZES, "--layers", 2, "--hidden", 8],
        KV + 2 * KV_HEADS * 4 * (D * 8 + 8 * 8 + 8 + 8 + 8 + 1),
        {"gflops", "matmul_bf16_gflops", "matmul_fp32_gflops"},
    ),
    "select_kv": (["--kv-len", N, "--heads", KV_HEADS, "--head-dim", D], KV_HEADS * N * 6, set()),
    "merge_states": (["--heads", HEADS, "--head-dim", D, "--states", 3], 4 * HEADS * (D * 2 + 4), set()),
    "change_basis": (
        ["--heads", HEADS, "--kv-heads", KV_HEADS, "--head-dim", D, "--tokens", 3],
        2 * HEADS * 3 * D * 2 + KV_HEADS * 4 * (D * D + D),
        set(),
    ),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """No figure needs to be right here, so nothing needs to be cold."""
    monkeypatch.setattr(bench.timing, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(bench.memory_speed, "BUFFER_BYTES", 1 << 18)
    monkeypatch.setattr(bench.timing, "CALM", 1.0)
    monkeypatch.setattr(bench.gate_score, "SQUARE", 64)


def run(module, *arguments):
    """Standard output of a benchmark."""
    app = typer.Typer()
    app.command()(importlib.import_module(f"bench.{module}").main)
    shared = ["--seconds", "0.001", "--threads", "1"]
    result = CliRunner().invoke(app, [*map(str, arguments), *shared], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(module, *arguments):
    out = run(module, *arguments, "--json")
    assert out.count("\n") == 1, "--json prints the JSON line alone"
    return json.loads(out)


def check_figures(figures):
    assert figures.keys() >= FIELDS
    for name, value in figures.items():
        if isinstance(value, float):
            assert math.isfinite(value), name
    for name in FIELDS - {"bandwidth_method", "best_torch", "rivals_us", "others_cpu"}:
        assert figures[name] > 0, name
    assert figures["floor_us"] == pytest.approx(figures["bytes"] / figures["bandwidth_gbps"] / 1e3)
    assert figures["floor_ratio"] == pytest.approx(figures["us"] / figures["floor_us"])
    assert figures["gbps"] == pytest.approx(figures["bytes"] / figures["us"] / 1e3)
    best = min(figures["rivals_us"].values())
    assert figures["rivals_us"][figures["best_torch"]] == best
    assert figures["speedup_vs_best_torch"] == pytest.approx(best / figures["us"])


@pytest.mark.parametrize("module", sorted(CASES))
def test_figures(module):
    arguments, num_bytes, extra = CASES[module]
    result = run_json(module, *arguments)
    check_figures(result)
    assert result["bytes"] == num_bytes
    assert result.keys() >= extra
    assert result["op"] == module and result["case"] and result["kernel_set"]


@pytest.mark.parametrize("module", ("quantize_kv", "dequantize_kv", "append_kv", "compact_kv"))
def test_a_tier_with_more_bits_for_keys(module):
    *table, line = run(module, *SIZES, "--bits", 302).splitlines()
    assert "K3V2, 2 kv heads" in "\n".join(table)
    check_figures(json.loads(line))


def test_all_six_rivals_of_attention():
    result = run_json("decode_attention", *SIZES, "--heads", HEADS)
    ways = ("sdpa repeated", "sdpa gqa", "folded matmul")
    assert set(result["rivals_us"]) == {f"{way} {dtype}" for way in ways for dtype in ("bfloat16", "float32")}


def test_decode_with_everything():
    arguments = ("--bits", 2, "--bits", 16, "--mix", "--mass", "--error", "--q-len", 3, "--batch", 2)
    result = run_json("decode_attention", *SIZES, "--heads", HEADS, *arguments)
    assert [case["bits"] for case in result["cases"]] == [2, 16]
    for case in result["cases"]:
        check_figures(case)
        assert case["bytes"] == 2 * KV_HEADS * PAGES * page_layout(case["bits"], D).page_bytes
        assert case["mass_ratio"] == pytest.approx(case["mass_us"] / case["us"])
        for name, smallest in (("ragged", case["bits"]), ("mix", 2)):
            size = case[f"{name}_bytes"]
            assert case["bytes"] - page_layout(smallest, D).page_bytes < size <= case["bytes"]
            per_byte = case[f"{name}_us"] / size / (case["us"] / case["bytes"])
            assert case[f"{name}_ratio"] == pytest.approx(per_byte)
        assert 0 < case["error"] < 3e-2 and 0 < case["error_torch_bf16"] < 3e-2


def test_compact_counts_the_records_that_move():
    arguments = [*SIZES, "--keep", 0.3]
    result = run_json("compact_kv", *arguments)
    check_figures(result)
    assert result["bytes"] == 2 * result["case"]["moved_records"] * PAGE // 64

    session = Session.open("compact_kv", "cpu", 1, 0.001, False, True, None)
    cache = uniform_cache(Tokens.random(1, KV_HEADS, N, D), 4)
    targets = random_targets(cache, 0.3)
    work = compact_calls(session, cache, targets)
    pool, length = work.calls[1].args[0][0], work.calls[1].args[2]
    for _ in range(2):  # the second call must meet the same cache as the first
        before = page_positions(pool, page_layout(4, D)).clone().reshape(KV_HEADS, -1)
        assert torch.equal(pool, cache.pools[0]) and torch.equal(length, cache.lengths)
        work.calls[1]()
        assert length.flatten().tolist() == [60] * KV_HEADS
        after = page_positions(pool, page_layout(4, D)).reshape(KV_HEADS, -1)
        assert (before != after)[:, :60].sum() == moved_records(targets)
        work.restore(1)


def test_append_starts_from_the_same_lengths():
    session = Session.open("append_kv", "cpu", 1, 0.001, False, True, None)
    work = append_calls(session, cache_with_room(N, 10, 1, KV_HEADS, D, 4), Tokens.random(1, KV_HEADS, 10, D))
    length = work.calls[1].args[2]
    for _ in range(2):
        assert length.flatten().tolist() == [N] * KV_HEADS
        work.calls[1]()
        assert length.flatten().tolist() == [N + 10] * KV_HEADS
        work.restore(1)


@pytest.mark.parametrize(("num_bytes", "heads"), ((2_000_000, 8), (123_456, 2), (20_000_000, 16)))
def test_ragged_pages_take_the_same_bytes(num_bytes, heads):
    page_bytes = torch.tensor([page_layout(bits, 128).page_bytes for bits in TIERS])
    counts = ragged_page_counts(num_bytes, heads, page_bytes.tolist())
    assert (counts >= 0).all()
    assert num_bytes - page_bytes[0] < (counts * page_bytes).sum() <= num_bytes
    if num_bytes > 1_000_000:
        sizes = (counts * page_bytes).sum(1)
        assert sizes.max() > 3 * sizes.min()


def test_mixed_lists_do_not_share_pages():
    cache = mixed_cache(300_000, 2, KV_HEADS, D)
    pages = (cache.lengths + 63) // 64
    used = torch.arange(cache.block_table.shape[3]) < pages[..., None]
    for tier, pool in enumerate(cache.pools):
        ids = cache.block_table[:, :, tier][used[:, :, tier]]
        assert ids.sort().values.tolist() == list(range(len(pool)))


def test_ways_to_attend_agree():
    q, k, v = torch.randn(2, 6, 3, D), torch.randn(2, 2, 50, D), torch.randn(2, 2, 50, D)
    first, *others = (way(q, k, v) for way in attention_ways(3).values())
    for other in others:
        torch.testing.assert_close(other, first)


@pytest.mark.parametrize(("bits", "limit"), ((2, 0.6), (302, 0.6), (3, 0.25), (4, 0.12), (8, 0.01)))
def test_eager_quantiser_is_a_quantiser(bits, limit):
    tokens = Tokens.random(1, KV_HEADS, N, D)
    rotation = rotation_matrix(D, torch.float32, torch.device("cpu"))
    packed = quantize_eagerly(tokens.k, tokens.v, tokens.mean, bits, rotation)
    for x, y in zip((tokens.k, tokens.v), dequantize_eagerly(*packed, tokens.mean, bits, rotation), strict=True):
        assert (x - y).float().norm() < limit * x.float().norm()


def test_table_then_json():
    lines = run("merge_states", *CASES["merge_states"][0]).splitlines()
    assert len(lines) > 4 and "torch: eager" in "\n".join(lines[:-1])
    check_figures(json.loads(lines[-1]))


def test_settings_of_caches():
    assert bench.kl.parse("tiers=4,K3V2 key_basis=0 mean_shift=1 window=64") == {
        "budget": None, "policy": "full", "tiers": ("4", "K3V2"), "key_basis": False, "mean_shift": True, "window": 64,
        "min_tokens": 0,
    }  # fmt: skip


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    run("merge_states", *CASES["merge_states"][0], "--json", "--plot", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install"):
        bench.output.draw("x", [{"method": "a", "us": 1.0}], tmp_path / "x.png")


def test_a_result_with_nan_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        bench.output.show("x", [{"a": 1}], {"us": float("nan")}, json_only=True)


@pytest.mark.parametrize(
    ("device", "message"),
    (("tpu", "cpu or cuda"), *([] if torch.cuda.is_available() else [("cuda", "no CUDA device")])),
)
def test_unusable_device(device, message):
    with pytest.raises(SystemExit, match=message):
        Session.open("quantize_kv", device, 1, 0.001, False, True, None)


def test_huge_pages_hold_the_same_values():
    if not sys.platform.startswith("linux"):
        pytest.skip("madvise is Linux's")
    x = torch.randn(3, 1000)
    for copy in bench.memory_speed.cold_copies(x, 3, torch.device("cpu"), huge_pages=True):
        assert torch.equal(copy, x) and copy.data_ptr() % 16 == 0


def test_all_writes_and_resumes(tmp_path):
    arguments = {"threads": 1, "only": "merge", "quick": True, "out": tmp_path}
    with pytest.raises(typer.Exit) as done:
        bench.all.main(**arguments)
    assert done.value.exit_code == 0
    (path,) = tmp_path.glob("*-cpu.json")
    record = json.loads(path.read_text())
    (entry,) = record["jobs"]
    check_figures(entry["result"])
    assert "| merge_states |" in path.with_suffix(".md").read_text()

    with pytest.raises(typer.Exit):
        bench.all.main(**arguments, resume=path)
    assert json.loads(path.read_text()) == record, "what is there is not run again"
    assert len(list(tmp_path.iterdir())) == 2
