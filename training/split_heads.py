"""Which heads retrieve and which stream: a calibration run, written as a policy map (DuoAttention's split).

python -m training.split_heads --text BOOK.txt --export heads.json
smartkv generate --policy heads.json ...

DuoAttention (Xiao et al. 2024) trains a gate per head to reproduce outputs on synthetic passkeys. Here nothing is
trained: a head's retrieval score is the share of its attention that goes beyond sinks and recent tokens, averaged over
the documents. The heads with the highest scores retrieve; the others keep sinks and the window alone, and their bytes
go to the retrieval heads of all layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.models import load
from bench.output import show
from smartkv_ext.policies import get_policy

from .reconstruction import NUM_SINKS, Trace
from .texts import documents
from .traces import collect


def retrieval_scores(traces: Sequence[Trace], recent: int) -> torch.Tensor:
    """(layers, num_kv_heads) share of the future queries' attention on earlier tokens, sinks and the newest ``recent``
    aside; mean over the batch. Raises ValueError where sinks and recent tokens are all there is.
    """
    shares = []
    for trace in traces:
        n = trace.future.shape[-1]
        if recent >= n - NUM_SINKS:
            raise ValueError(f"recent must be below {n - NUM_SINKS}, the tokens that are no sinks; got {recent}")
        beyond = trace.future[..., NUM_SINKS : n - recent].sum(-1)
        shares.append((beyond / trace.future.sum(-1)).mean(0))
    return torch.stack(shares)


def policy_map(scores: torch.Tensor, retrieval: float, recent: int, policy: str) -> dict[str, Any]:
    """A map in which the ``retrieval`` share of all heads with the highest ``scores`` follow ``policy``."""
    layers, heads = scores.shape
    count = max(1, round(retrieval * layers * heads))
    chosen = torch.zeros(layers * heads, dtype=torch.bool)
    chosen[scores.flatten().topk(count).indices] = True
    rules = []
    for layer, row in enumerate(chosen.view(layers, heads).tolist()):
        streaming = [head for head, retrieves in enumerate(row) if not retrieves]
        if streaming:
            follow = {"name": "streaming_llm", "recent": recent}
            rules.append({"layers": layer, "heads": streaming, "policy": follow, "share": 0})
    return {"version": 1, "default": policy, "rules": rules}


def main(
    text: Annotated[list[str], typer.Option(help="text file or .jsonl of exercises; may be repeated")],
    export: Annotated[Path, typer.Option(help="policy map to write")],
    model: str = "smollm2",
    dtype: str = "float32",
    retrieval: Annotated[float, typer.Option(help="share of the heads that retrieve", min=0.01, max=1)] = 0.5,
    recent: Annotated[int, typer.Option(help="tokens that a streaming head keeps; at most the cache's window")] = 128,
    policy: Annotated[str, typer.Option(help="what retrieval heads follow")] = "snapkv",
    per_file: int = 2,
    tokens: int = 1024,
    future: int = 128,
) -> None:
    """Print a row per layer and write the map; last line JSON."""
    start = time.perf_counter()
    get_policy(policy)
    network, tokenizer = load(model, dtype)
    found = [
        retrieval_scores(collect(network, ids, tokens), recent)
        for source in text
        for ids in documents(tokenizer, source, per_file, tokens + future)
    ]
    scores = torch.stack(found).mean(0)
    content = policy_map(scores, retrieval, recent, policy)
    get_policy("map", **content).check(*scores.shape)
    export.write_text(json.dumps(content, indent=2) + "\n")
    streams = {rule["layers"]: rule["heads"] for rule in content["rules"]}
    rows = [
        {"layer": i, "attention beyond sinks and recent": " ".join(f"{x:.3f}" for x in row),
         "streaming heads": " ".join(map(str, streams.get(i, [])))}
        for i, row in enumerate(scores.tolist())
    ]  # fmt: skip
    result = {"scores": scores.tolist(), "documents": len(found), "seconds": time.perf_counter() - start}
    show(f"{Path(model).name}: retrieval scores of the KV heads", rows, result)


if __name__ == "__main__":
    typer.run(main)
