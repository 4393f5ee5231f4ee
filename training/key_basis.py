"""The basis in which a model's keys lose least when they are quantised: a calibration run, put into a gate folder.

python -m training.key_basis --recipe RECIPE --model MODEL --gates runs/MODEL/gates
SmartKVCache(model.config, key_basis="runs/MODEL/gates")

Second moments of the rotated queries and the centred rotated keys of every KV head, each text scaled to the same
power, give the map that balances them (``gates.balancing_map``). Half of that map, in powers, is what held up best on
other texts (docs/design/quality.md, "A basis for keys").
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from bench.models import load
from bench.output import show
from smartkv_ext import patch
from smartkv_ext.eval.recording import LayerRecording, record
from smartkv_ext.gates import Gates, KeyBasis, ModelFacts, balancing_map
from smartkv_ext.hf.gate_check import sketch_of

from .recipe import Recipe
from .texts import Mixture

STRENGTH = 0.5


def moments(layer: LayerRecording) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(Cq, Ck, mean key) of one sequence: (num_kv_heads, head_dim, head_dim) twice, of traces 1, and (num_kv_heads,
    head_dim), float64."""
    q, k = layer.q[0].double(), layer.k[0].double()
    mean = k.mean(1)
    centred, grouped = k - mean[:, None], q.unflatten(0, (k.shape[0], -1)).flatten(1, 2)
    power = [x.mT @ x for x in (grouped, centred)]
    of_queries, of_keys = (x / x.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=1e-12) for x in power)
    return of_queries, of_keys, mean


def fit(texts: Iterable[list[LayerRecording]], strength: float = STRENGTH) -> KeyBasis:
    """Of the layers of one prefill per text; every text counts the same."""
    sums: list[list[torch.Tensor]] = []
    count = 0
    for layers in texts:
        found = [list(moments(layer)) for layer in layers]
        sums = [[a + b for a, b in zip(*x, strict=True)] for x in zip(sums, found, strict=True)] if sums else found
        count += 1
    packed = []
    for of_queries, of_keys, mean in sums:
        matrix = balancing_map(of_queries, of_keys, strength)
        packed.append(torch.cat([matrix, mean[:, None] / count], 1))
    return KeyBasis(torch.stack(packed))


def main(
    gates: Annotated[Path, typer.Option(help="gate folder that gets the basis")],
    recipe: Annotated[Path, typer.Option(help="recipe or its name: whose model, dtype and training texts")] = Path(
        "small"
    ),
    text: Annotated[list[str] | None, typer.Option(help="sources instead of the recipe's; repeatable")] = None,
    model: Annotated[str | None, typer.Option(help="other than the recipe's")] = None,
    pieces: Annotated[int, typer.Option(help="texts", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="of each", min=128)] = 3072,
    strength: Annotated[float, typer.Option(help="power of the balancing map", min=0, max=1)] = STRENGTH,
) -> None:
    """Print a row per layer; last line JSON."""
    start = time.process_time()
    changes = {"sources": {source: 1 / len(text) for source in text}} if text else {}
    chosen = Recipe.load(recipe, **changes)
    learned = Gates.from_pretrained(gates)
    texts = Mixture.read(chosen.sources, "train", chosen.valid_share).bundled(tokens)
    network, tokenizer = load(model or chosen.model, chosen.dtype)
    learned.check_model(ModelFacts.from_config(network.config))
    if (sketch := sketch_of(network)) is not None:
        learned.check_sketch(sketch)

    def prefills() -> Iterator[list[LayerRecording]]:
        for i in tqdm(range(pieces), unit="text", mininterval=5):
            ids, _ = texts.piece(tokenizer, f"key_basis/{chosen.seed}/{i}", tokens)
            yield record(network, ids[None]).layers

    with patch(network):
        learned.basis = basis = fit(prefills(), strength)
    learned.save_pretrained(gates)
    condition = torch.linalg.cond(basis.packed[:, :, :-1].double())
    rows = [{"layer": i, "least condition": float(x.min()), "largest": float(x.max())} for i, x in enumerate(condition)]
    seconds = time.process_time() - start
    show(f"key basis of {pieces} texts of {tokens} tokens", rows, {"strength": strength, "cpu_seconds": seconds})


if __name__ == "__main__":
    typer.run(main)
