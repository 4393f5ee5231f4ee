"""What learned gates cost a real model: their share of the time of prefill and decoding, and of the parameters.

python -m bench.gate_cost --model FOLDER --gates runs/MODEL/gates      default: the gates that come with the package

CPU time of one thread, least of some rounds, so that other work on the machine counts little. As the cache calls them:
in a prefill layer by layer, in a decoding step all layers at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import smartkv_ext
from bench.models import load, text_ids
from bench.output import show
from smartkv_ext import SmartKVCache
from smartkv_ext.gates import Gates, ModelFacts, shipped_gates
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.policies import get_policy
from training.recording import LayerCall, recording


def cpu_seconds(work: Callable[[], Any], rounds: int) -> float:
    """Least CPU time of ``rounds`` calls, all threads together."""
    least = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        work()
        least = min(least, time.process_time() - start)
    return least


def score_layers(gates: Gates, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Score layer by layer: keys, values (1, num_kv_heads, n, head_dim) of each."""
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        gates.score([k], [v], i)


def main(
    model: str = "smollm2",
    gates: Annotated[Path | None, typer.Option(help="folder; default: those of the package")] = None,
    text: Annotated[Path | None, typer.Option(help="default: Python's language reference")] = None,
    dtype: str = "bfloat16",
    tokens: Annotated[int, typer.Option(min=64, help="of the prefill, and before the decoding steps")] = 2048,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1, help="decoding steps")] = 20,
) -> None:
    """Print a row per phase; last line JSON."""
    torch.set_num_threads(1)
    network, tokenizer = load(model, dtype)
    learned = Gates.from_pretrained(gates) if gates else shipped_gates(ModelFacts.from_config(network.config))
    ids, calls = text_ids(tokenizer, tokens, text), list[LayerCall]()
    with torch.no_grad():
        with recording(network, calls.append):
            network.base_model(ids, use_cache=False)
        keys, values = [call.pre_rope for call in calls], [call.v for call in calls]
        one = [[x[:, :, -1:].contiguous() for x in tensors] for tensors in (keys, values)]
        many = [[x.contiguous() for x in tensors] for tensors in (keys, values)]
        del calls
        scoring = {
            "prefill": cpu_seconds(lambda: score_layers(learned, *many), rounds),
            "decode": cpu_seconds(lambda: [learned.score(*one) for _ in range(100)], rounds) / 100,
        }
        whole = {"prefill": cpu_seconds(lambda: network.base_model(ids, use_cache=False), rounds)}
        cache = SmartKVCache(network.config, policy=get_policy("gate", gates=learned))
        with smartkv_ext.patch(network):
            network(ids, **cache_kwargs(cache), logits_to_keep=1)
            whole["decode"] = cpu_seconds(lambda: network(ids[:, -1:], **cache_kwargs(cache)), steps)
    rows: list[dict[str, Any]] = [
        {
            "phase": name,
            "gates ms": 1e3 * scoring[name],
            "model ms": 1e3 * whole[name],
            "share": scoring[name] / seconds,
        }
        for name, seconds in whole.items()
    ]
    size = sum(p.numel() for p in network.parameters())
    result = {"rows": rows, "tokens": tokens, "gates": learned.num_parameters, "share": learned.num_parameters / size}
    show(f"{Path(model).name}: {learned.num_parameters:,} parameters in gates, {result['share']:.3%} of the model's",
         rows, result)  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
