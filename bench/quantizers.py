"""Quantisers of keys and values as functions, ours and rivals', with the true bits that each stores per value.

All take x (batch, num_kv_heads, n, head_dim) float32 and give back what a reader would see, and bits per value with
scales, zeros and shared means counted, but not what a head has once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from bench.key_maps import full_map, pair_map, through
from smartkv_ext.eval.simulated import affine
from smartkv_ext.gates import LayerBasis
from smartkv_ext.reference.hadamard import rotate
from smartkv_ext.reference.levels import gaussian_unit, level_table
from smartkv_ext.reference.quantizer import FITS, K_FIT, V_FIT, decode, encode

PAGE = 64
FP16 = 16


@dataclass
class Calibration:
    """What another text has taught, per KV head: mean key (heads, head_dim), a full map and one of channel pairs
    (heads, head_dim, head_dim; ``key_maps``), the known bias of the key projection (heads, head_dim); and what comes
    with the package."""

    mean: torch.Tensor
    key_map: torch.Tensor
    pair_map: torch.Tensor
    bias: torch.Tensor
    basis: LayerBasis  # the shipped one, or the model's own


@dataclass
class Tensors:
    """One layer of the tested text: q (1, num_heads, n, head_dim); k, v, pre_rope (1, num_kv_heads, n, head_dim)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pre_rope: torch.Tensor
    calibration: Calibration
    turn: Callable[[torch.Tensor], torch.Tensor]  # pre-RoPE keys -> keys


Quantizer = Callable[[Tensors, int], tuple[torch.Tensor, float]]  # layer, bits -> keys or values, bits per value


def codebook(
    x: torch.Tensor, bits: int, group: int = 0, levels: str = "gaussian", fit: str = K_FIT
) -> tuple[torch.Tensor, float]:
    """Rotate, nearest level, fp16 scale (reference.quantizer.FITS) per token, or per ``group`` rotated values: as the
    ops do."""
    y = rotate(x.float())
    parts = y if not group else y.unflatten(-1, (-1, group))
    codes, scale = encode(parts, bits, levels, fit)
    back = decode(codes, scale, bits, levels)
    back = back if not group else back.flatten(-2)
    return rotate(back, inverse=True), bits + FP16 / (group or x.shape[-1])


def refined(x: torch.Tensor, bits: int, steps: int = 3, fit: str = "least_squares") -> tuple[torch.Tensor, float]:
    """As ``codebook``, with codes and least-squares scale fitted to each other ``steps`` times more (Lloyd's iteration
    on one scale), and then the scale of ``fit`` (reference.quantizer.FITS)."""
    if bits == 8:
        return codebook(x, bits)
    y, table = rotate(x.float()), level_table(bits, "gaussian")
    scale = y.square().mean(-1).sqrt() * gaussian_unit(bits)
    for step in range(steps + 1):
        normal = y / scale.half().float().clamp(min=1e-8)[..., None]
        level = table[torch.bucketize(normal, (table[1:] + table[:-1]) / 2)]
        scale = FITS["least_squares" if step < steps else fit](y, level)
    return rotate(level * scale.half().float()[..., None], inverse=True), bits + FP16 / x.shape[-1]


def minmax(x: torch.Tensor, bits: int, group: int = 32) -> tuple[torch.Tensor, float]:
    """Asymmetric min-max per token and group."""
    return affine(x, bits, -1, group), bits + 2 * FP16 / group


def clipped(x: torch.Tensor, bits: int, group: int = 32) -> tuple[torch.Tensor, float]:
    """Min-max with the range shrunk to where the squared error is least, of 11 candidates."""
    grouped = x.float().unflatten(-1, (-1, group))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    middle, half = (low + high) / 2, (high - low) / 2
    best, error = grouped, torch.full_like(low, torch.inf)
    for share in torch.linspace(0.5, 1, 11):
        zero = (middle - share * half).half().float()
        scale = (2 * share * half / (2**bits - 1)).half().float().clamp(min=1e-8)
        back = ((grouped - zero) / scale).round().clamp(0, 2**bits - 1) * scale + zero
        squared = (back - grouped).square().sum(-1, keepdim=True)
        best, error = torch.where(squared < error, back, best), torch.minimum(squared, error)
    return best.flatten(-2), bits + 2 * FP16 / group


def per_channel(x: torch.Tensor, bits: int, group: int = 32) -> tuple[torch.Tensor, float]:
    """KIVI's keys: groups of tokens in each channel; what fills no group stays exact, as its residual."""
    whole = x.shape[2] // group * group
    return torch.cat([affine(x[:, :, :whole], bits, 2, group), x[:, :, whole:]], 2), bits + 2 * FP16 / group


def page_means(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean of every page of 64 tokens at 8 bits per channel with an fp16 scale; tokens beyond the last page share its
    mean. Returns it for every token, and its bits per value."""
    whole = max(x.shape[2] // PAGE, 1)
    mean = x[:, :, : whole * PAGE].unflatten(2, (whole, -1)).mean(3)
    scale = (mean.abs().amax(-1, keepdim=True) / 127).half().float().clamp(min=1e-8)
    mean = (mean / scale).round() * scale
    each = mean.repeat_interleave(PAGE, 2)
    rest = x.shape[2] - each.shape[2]
    if rest > 0:
        each = torch.cat([each, mean[:, :, -1:].expand(-1, -1, rest, -1)], 2)
    return each[:, :, : x.shape[2]], 8 / PAGE + FP16 / (PAGE * x.shape[-1])


def of_backend(x: torch.Tensor, bits: int, backend: str) -> tuple[torch.Tensor, float]:
    """What transformers' QuantizedCache gives back: its own defaults, groups of 64, bytes of its tensors."""
    from transformers import QuantizedCache, Qwen2Config

    from smartkv_ext.eval.methods import tensor_bytes

    axis = 0 if backend == "quanto" else 1
    cache = QuantizedCache(backend, Qwen2Config(num_hidden_layers=1), nbits=bits, axis_key=axis, axis_value=axis)
    layer: Any = cache.layers[0]
    layer.lazy_initialization(x, x)
    packed = layer._quantize(x.to(torch.bfloat16).contiguous(), axis)
    layer.keys = layer.keys.to(torch.bfloat16)
    back: torch.Tensor = layer._dequantize(packed)
    return back.float().view_as(x), 8 * tensor_bytes(packed) / x.numel()


def shifted(x: torch.Tensor, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, float]]) -> Any:
    """Quantise what is left of keys beyond their head's mean over the text."""
    mean = x.mean(2, keepdim=True)
    back, bits = quantize(x - mean)
    return back + mean, bits


def paged(x: torch.Tensor, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, float]]) -> Any:
    """Quantise what is left of keys beyond the mean of their head and of their page."""
    centred = x - x.mean(2, keepdim=True)
    mean, extra = page_means(centred)
    back, bits = quantize(centred - mean)
    return back + mean + x - centred, bits + extra


def mapped(layer: Tensors, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, float]]) -> Any:
    """Through the map of another text, less that text's mean key."""
    mean = layer.calibration.mean[None, :, None]
    back, bits = through(layer.k - mean, layer.calibration.key_map, quantize)
    return back + mean, bits


def of_prompt(layer: Tensors, make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], judged: int = 256) -> Any:
    """A map of the text itself, made before the judging queries come."""
    return make(layer.q[0, :, :-judged], layer.k[0, :, :-judged])


def in_basis(layer: Tensors, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, float]]) -> Any:
    """In the basis of the package, less the text's own mean: what a SmartKVCache does."""
    back, bits = shifted(layer.calibration.basis.keys(layer.k), quantize)
    return layer.calibration.basis.model_keys(back), bits


def own_mean(k: torch.Tensor, key_map: torch.Tensor, bits: int, steps: int = 0, fit: str = "least_squares") -> Any:
    """Keys less the text's own mean, mapped, as the ops encode them."""
    return shifted(k, lambda x: through(x, key_map, lambda y: refined(y, bits, steps, fit)))


def before_rope(layer: Tensors, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, float]]) -> Any:
    """Keys before their rotation, less the bias of their projection; readers rotate them."""
    bias = layer.calibration.bias[None, :, None]
    back, bits = quantize(layer.pre_rope - bias)
    return layer.turn(back + bias), bits


def signed(x: torch.Tensor) -> torch.Tensor:
    """Fixed random signs of the channels: with the Hadamard rotation the random rotation of TurboQuant."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (x.shape[-1],), generator=generator).float() * 2 - 1


def turbo(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, float]:
    """Random rotation, Gaussian codebook, norm per token, no mean (Zandieh et al. 2025, without its residual bit)."""
    back, size = codebook(x * signed(x), bits, fit="least_squares")
    return back * signed(x), size


KEYS: dict[str, Quantizer] = {
    "per token g32": lambda t, b: minmax(t.k, b),
    "H, per token g32": lambda t, b: _turned(t.k, b, minmax),
    "TurboQuant-style": lambda t, b: turbo(t.k, b),
    "KIVI, per channel g32": lambda t, b: per_channel(t.k, b),
    "mean, per token g32": lambda t, b: shifted(t.k, lambda x: minmax(x, b)),
    "mean, H, per token g32": lambda t, b: shifted(t.k, lambda x: _turned(x, b, minmax)),
    "mean, H, clip searched g32": lambda t, b: shifted(t.k, lambda x: _turned(x, b, clipped)),
    "mean, H, uniform": lambda t, b: shifted(t.k, lambda x: codebook(x, b, levels="uniform")),
    "ours: mean, H, codebook": lambda t, b: shifted(t.k, lambda x: codebook(x, b)),
    "ours, shipped key basis": lambda t, b: in_basis(t, lambda x: codebook(x, b)),
    "ours, norm kept": lambda t, b: shifted(t.k, lambda x: refined(x, b, 0, "norm")),
    "ours, unbiased": lambda t, b: shifted(t.k, lambda x: refined(x, b, 0, "unbiased")),
    "ours, scale refined once": lambda t, b: shifted(t.k, lambda x: refined(x, b, 1)),
    "ours, scale refined": lambda t, b: shifted(t.k, lambda x: refined(x, b)),
    "ours, refined, norm kept": lambda t, b: shifted(t.k, lambda x: refined(x, b, 3, "norm")),
    "ours, refined, unbiased": lambda t, b: shifted(t.k, lambda x: refined(x, b, 3, "unbiased")),
    "ours, g32": lambda t, b: shifted(t.k, lambda x: codebook(x, b, 32)),
    "page mean, H, codebook": lambda t, b: paged(t.k, lambda x: codebook(x, b)),
    "calibrated map, H, codebook": lambda t, b: mapped(t, lambda x: codebook(x, b)),
    "map, own mean": lambda t, b: own_mean(t.k, t.calibration.key_map, b),
    "map, own mean, refined, norm kept": lambda t, b: own_mean(t.k, t.calibration.key_map, b, 3, "norm"),
    "pair map, own mean": lambda t, b: own_mean(t.k, t.calibration.pair_map, b),
    "map of the prompt": lambda t, b: own_mean(t.k, of_prompt(t, full_map), b),
    "pair map of the prompt": lambda t, b: own_mean(t.k, of_prompt(t, pair_map), b),
    "map, page mean, H, codebook": lambda t, b: mapped(t, lambda x: paged(x, lambda y: codebook(y, b))),
    "pre-RoPE less bias, H, codebook": lambda t, b: before_rope(t, lambda x: codebook(x, b)),
    "pre-RoPE, page mean, H, codebook": lambda t, b: before_rope(t, lambda x: paged(x, lambda y: codebook(y, b))),
    "quanto g64": lambda t, b: of_backend(t.k, b, "quanto"),
    "hqq g64": lambda t, b: of_backend(t.k, b, "hqq"),
}
VALUES: dict[str, Quantizer] = {
    "per token g32 (KIVI)": lambda t, b: minmax(t.v, b),
    "per token g32, clip searched": lambda t, b: clipped(t.v, b),
    "TurboQuant-style": lambda t, b: turbo(t.v, b),
    "H, uniform": lambda t, b: codebook(t.v, b, levels="uniform"),
    "ours: H, codebook": lambda t, b: codebook(t.v, b, fit=V_FIT),
    "ours, norm kept": lambda t, b: refined(t.v, b, 0, "norm"),
    "ours, unbiased": lambda t, b: refined(t.v, b, 0, "unbiased"),
    "ours, scale refined once": lambda t, b: refined(t.v, b, 1),
    "ours, scale refined": lambda t, b: refined(t.v, b),
    "ours, g32": lambda t, b: codebook(t.v, b, 32, fit=V_FIT),
    "mean, H, codebook": lambda t, b: shifted(t.v, lambda x: codebook(x, b, fit=V_FIT)),
    "quanto g64": lambda t, b: of_backend(t.v, b, "quanto"),
    "hqq g64": lambda t, b: of_backend(t.v, b, "hqq"),
}
NOT_AT = {"quanto g64": (3, 8), "hqq g64": (3,)}  # bits that a backend does not have
INSTALLED = {"quanto g64": is_optimum_quanto_available, "hqq g64": is_hqq_available}


def is_offered(name: str, bits: int) -> bool:
    """Whether a method has this number of bits, and its package is installed."""
    return bits not in NOT_AT.get(name, ()) and (name not in INSTALLED or INSTALLED[name]())


def _turned(x: torch.Tensor, bits: int, quantize: Any) -> tuple[torch.Tensor, float]:
    back, size = quantize(rotate(x.float()), bits)
    return rotate(back, inverse=True), size
