"""Error of attention output when only keys, or only values, are quantised: ours, its variants, and rivals.

python -m bench.quantizer --model FOLDER --calibrate A.txt@0.5 --test B.txt@0.5

Relative L2 error of the attention output of the last 256 queries against exact attention, mean over every third layer,
for real queries, keys and values; calibration sees another text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.key_maps import full_map, pair_map
from bench.models import load
from bench.output import show
from bench.quantizers import KEYS, VALUES, Calibration, Tensors, is_offered
from smartkv_ext.eval.recording import Recording, record
from smartkv_ext.eval.tasks.options import first_tokens, language_reference, read_text
from smartkv_ext.gates import LayerBasis, ModelFacts, find_shipped_gates
from smartkv_ext.hf import patch
from smartkv_ext.hf.patching import attention_modules


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last q_len tokens: q (1, num_heads, q_len, head_dim), k, v (1, num_kv_heads, n,
    head_dim), float32 -> as q."""
    q_len, n = q.shape[2], k.shape[2]
    mask = torch.ones(q_len, n, dtype=torch.bool).tril(n - q_len)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def calibrate(layer: Any, bias: torch.Tensor, basis: LayerBasis) -> Calibration:
    """Mean key and maps of another text."""
    q, k = layer.q[0], layer.k[0]
    return Calibration(k.float().mean(1), full_map(q, k), pair_map(q, k), bias, basis)


def rotary(model: Any, length: int) -> Any:
    """Pre-RoPE keys (1, heads, length, head_dim) -> keys, as the model turns them."""
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1), torch.arange(length)[None])
    cos, sin = cos[:, None].float(), sin[:, None].float()

    def turn(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return turn


def layers(model: Any, test: Recording, calibration: Recording, every: int) -> list[Tensors]:
    """float32 tensors of every third layer, say."""
    turn = rotary(model, test.num_tokens)
    gates = find_shipped_gates(ModelFacts.from_config(model.config))
    shipped = None if gates is None else gates.basis
    parts = list(zip(attention_modules(model), test.layers, calibration.layers, strict=True))
    out = []
    for i in range(0, len(parts), every):
        module, here, other = parts[i]
        found: Any = module
        heads, head_dim = here.k.shape[1], here.k.shape[3]
        bias = found.k_proj.bias
        bias = torch.zeros(heads, head_dim) if bias is None else bias.detach().float().view(heads, head_dim)
        basis = LayerBasis() if shipped is None else shipped.of_layer(i, bias.device, 0, heads)
        tensors = (here.q.float(), here.k.float(), here.v.float(), here.pre_rope.float())
        out.append(Tensors(*tensors, calibrate(other, bias, basis), turn))
    return out


def errors(
    found: list[Tensors], bits: int, queries: int, sinks: int, chosen: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """A row per method and side."""
    rows = []
    for side, methods in (("keys", KEYS), ("values", VALUES)):
        for name, quantize in methods.items():
            if not is_offered(name, bits) or not (chosen is None or name in chosen):
                continue
            each, size = [], 0.0
            for layer in found:
                back, size = quantize(layer, bits)
                exact = layer.k if side == "keys" else layer.v
                back = torch.cat([exact[:, :, :sinks], back[:, :, sinks:]], 2)
                q = layer.q[:, :, -queries:]
                truth = attend(q, layer.k, layer.v)
                ours = attend(q, back, layer.v) if side == "keys" else attend(q, layer.k, back)
                each.append(((ours - truth).norm() / truth.norm()).item())
            worst = max(each)
            mean = sum(each) / len(each)
            row = {"of": side, "method": name, "bits": bits, "true bits": size, "error": mean, "worst": worst}
            rows.append(row | {"each": each})
    return rows


def main(
    model: str = "smollm2",
    dtype: str = "float32",
    calibrate_on: Annotated[str | None, typer.Option("--calibrate", help="FILE or FILE@0.5")] = None,
    test: Annotated[str | None, typer.Option(help="FILE or FILE@0.5")] = None,
    tokens: int = 3072,
    queries: Annotated[int, typer.Option(help="last queries that judge")] = 256,
    every: Annotated[int, typer.Option(help="take one layer of so many")] = 3,
    bits: list[int] = [4, 3, 2],  # noqa: B006
    method: Annotated[list[str], typer.Option(help="none: all of bench/quantizers.py")] = [],  # noqa: B006
    sinks: Annotated[int, typer.Option(help="first tokens that stay exact")] = 0,
    recordings: Annotated[Path | None, typer.Option(help="folder for the two prefills")] = None,
) -> None:
    """Print the table and one JSON line."""
    start = time.process_time()
    network, tokenizer = load(model, dtype)
    texts = [read_text(x) if x else language_reference() for x in (test, calibrate_on)]
    halves = [texts[0], texts[1] if calibrate_on else texts[1][len(texts[1]) // 2 :]]
    found = []
    with patch(network):
        for name, text in zip(("test", "calibrate"), halves, strict=True):
            path = recordings / f"quantizer-{Path(model).name}-{dtype}-{name}.safetensors" if recordings else None
            if path is not None and path.exists():
                found.append(Recording.load(path))
                continue
            found.append(record(network, first_tokens(tokenizer, text, tokens, name)))
            if path is not None:
                found[-1].save(path)
        captured = layers(network, *found, every)
    rows = [row for b in bits for row in errors(captured, b, queries, sinks, method or None)]
    seconds = time.process_time() - start
    title = f"{Path(model).name} {dtype}: attention output error, {tokens} tokens, last {queries} queries"
    table = [{name: x for name, x in row.items() if name != "each"} for row in rows]
    show(title, table, {"tokens": tokens, "sinks": sinks, "cpu_seconds": seconds, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
