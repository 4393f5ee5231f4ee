"""smartkv_ext._core equals the Python twins, and page bytes are laid out as written down."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartkv_ext import _core, ops
from smartkv_ext.reference import layout, levels
from smartkv_ext.reference.hadamard import rotate

SIZES = ("tier", "k_bits", "v_bits", "head_dim", "itemsize")


@pytest.mark.parametrize("itemsize", (2, 4))
@pytest.mark.parametrize("head_dim", layout.HEAD_DIMS)
@pytest.mark.parametrize("bits", layout.TIERS)
def test_page_layout(bits: int, head_dim: int, itemsize: int) -> None:
    expected = dataclasses.asdict(layout.page_layout(bits, head_dim, itemsize))
    assert _core.page_layout(bits, head_dim, itemsize) == expected
    starts = [value for name, value in expected.items() if name not in SIZES and value >= 0]
    assert all(start % 64 == 0 for start in starts)


def test_constants() -> None:
    assert (_core.PAGE_SIZE, _core.PAGE_FORMAT_VERSION) == (layout.PAGE_SIZE, layout.PAGE_FORMAT_VERSION)
    assert (layout.TIERS, layout.HEAD_DIMS, len(layout.TIERS)) == (_core.TIERS, _core.HEAD_DIMS, _core.MAX_TIERS)


def test_stub_names_what_there_is() -> None:
    """The type checker sees the stub alone."""
    stub = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text())
    functions = {
        node.name: [arg.arg for arg in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)
    }
    constants = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert functions.keys() | constants == {name for name in vars(_core) if not name.startswith("_")}
    for name, arguments in functions.items():
        signature = getattr(_core, name).__doc__.splitlines()[0].split("->")[0]
        assert re.findall(r"(\w+): ", signature) == arguments, name


@pytest.mark.parametrize("kind", levels.LEVELS)
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_level_table(bits: int, kind: str) -> None:
    assert _core.level_table(bits, kind) == levels.level_table(bits, kind).tolist()


def test_core_names_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="tier must be one of 2, 302, 3, 403, 4, 8, 16; got 5"):
        _core.page_layout(5, 64)
    with pytest.raises(ValueError, match="head_dim must be one of 64, 80, 96, 128, 256; got 65"):
        _core.page_layout(4, 65)
    with pytest.raises(ValueError, match="itemsize must be one of 2, 4; got 3"):
        _core.page_layout(4, 64, 3)
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 8; got 16"):
        _core.level_table(16, "gaussian")
    with pytest.raises(ValueError, match="levels must be one of uniform, gaussian; got 'x'"):
        _core.level_table(4, "x")


def test_build_info() -> None:
    info = ops.build_info()
    assert info["version"] == "0.1.0" and info["compiler"] and "-O3" in info["cxx_flags"]
    assert isinstance(info["cuda"], bool) and info["kernel_set"] in ops.available_kernel_sets()
    assert ops.available_kernel_sets()[-1] == "portable" and isinstance(ops.cpu_features(), list)


def test_core_does_not_load_torch() -> None:
    code = "import sys, smartkv_ext._core as c; c.page_layout(4, 64); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_library_tells_the_command() -> None:
    code = "import sys; sys.modules['smartkv_ext._C'] = None; import smartkv_ext.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install --no-build-isolation -e ." in done.stderr


codes = st.tuples(st.sampled_from((2, 3, 4, 8)), st.sampled_from(layout.HEAD_DIMS), st.integers(0, 2**31))


@given(codes, st.sampled_from("kv"))
def test_unpack_inverts_pack(shape: tuple[int, int, int], kind: str) -> None:
    bits, head_dim, seed = shape
    wanted = torch.randint(0, 2**bits, (2, 64, head_dim), generator=torch.Generator().manual_seed(seed))
    packed = layout.pack_codes(wanted, bits, kind)
    assert torch.equal(layout.unpack_codes(packed, bits, head_dim, kind), wanted.int())


pages = st.tuples(st.sampled_from(layout.TIERS[:-1]), st.sampled_from(layout.HEAD_DIMS), st.integers(0, 2**31))


@given(pages, st.sampled_from(levels.LEVELS))
def test_kernels_unpack_what_was_packed(shape: tuple[int, int, int], kind: str) -> None:
    """Pages of arbitrary codes, built in Python, decode to scale * level in the rotated space."""
    tier, head_dim, seed = shape
    random = torch.Generator().manual_seed(seed)
    place = layout.page_layout(tier, head_dim)
    stored = torch.zeros(1, 1, 2, place.page_bytes, dtype=torch.uint8)
    expected = []
    for name in "kv":
        bits = place.bits(name)
        wanted = torch.randint(0, 2**bits, (1, 1, 2, 64, head_dim), generator=random)
        scale = torch.rand(1, 1, 2, 64, generator=random).half()
        stored[..., place.section(name)] = layout.pack_codes(wanted, bits, name)
        stored[..., place.scales(name)].view(torch.float16).copy_(scale)
        y = levels.level_table(bits, kind)[wanted] * scale.float()[..., None]
        expected.append(rotate(y, inverse=True).flatten(2, 3))
    got = ops.dequantize_kv(stored, torch.zeros(1, 1, head_dim), head_dim, tier, kind, torch.float32)
    for ours, want in zip(got, expected, strict=True):
        assert torch.allclose(ours, want, atol=1e-4, rtol=1e-5)
