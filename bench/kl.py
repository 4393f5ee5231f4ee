"""Quality at true bytes: KL(full || compressed) over teacher-forced tokens after a prefill, for several settings.

python -m bench.kl --model FOLDER --text FILE --prefill 2048 --tokens 256
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

import smartkv_ext
from bench.models import load, text_ids
from bench.output import show
from smartkv_ext import SmartKVCache
from smartkv_ext.eval.methods import smartkv_arguments
from smartkv_ext.hf import cache_kwargs
from smartkv_ext.reference.layout import TIERS, tier_name

ALL_KEPT = [f"tiers={tier_name(tier)}" for tier in reversed(TIERS)] + ["tiers=4 levels=uniform mean_shift=0"]
BUDGETS = [f"budget={b} policy={p}" for b in (0.25, 0.125) for p in ("keydiff", "snapkv", "streaming_llm", "random")]


def parse(setting: str) -> dict[str, Any]:
    """ "budget=0.125 policy=keydiff tiers=2,4" -> arguments of SmartKVCache; without a budget every token is kept."""
    options = dict(item.split("=") for item in shlex.split(setting))
    return smartkv_arguments({"budget": "none", "policy": "full"} | options)


def main(
    model: str = "smollm2",
    dtype: str = "float32",
    text: Path | None = None,
    skip: Annotated[int, typer.Option(help="tokens of the text to skip")] = 0,
    prefill: int = 2048,
    tokens: int = 256,
    setting: Annotated[list[str], typer.Option(help='such as "budget=0.125 policy=snapkv"')] = ALL_KEPT + BUDGETS,
) -> None:
    """Print a table and one JSON line. The compressed run sees the last tokens in one forward, at the cache's own
    pace."""
    network, tokenizer = load(model, dtype)
    ids = text_ids(tokenizer, skip + prefill + tokens, text)[:, skip:]
    rows = []
    with torch.no_grad():
        cache: Any = DynamicCache()
        network(ids[:, :prefill], **cache_kwargs(cache), logits_to_keep=1)
        full = network(ids[:, prefill:], **cache_kwargs(cache)).logits[0].float().log_softmax(-1)
        del cache
        with smartkv_ext.patch(network):
            for item in setting:
                cache = SmartKVCache(network.config, **parse(item))
                network(ids[:, :prefill], **cache_kwargs(cache), logits_to_keep=1)
                report = cache.report()
                ours = network(ids[:, prefill:], **cache_kwargs(cache)).logits[0].float().log_softmax(-1)
                rows.append({
                    "setting": item,
                    "ratio": report.ratio,
                    "kl": (full.exp() * (full - ours)).sum(-1).mean().item(),
                    "top1": (full.argmax(-1) == ours.argmax(-1)).float().mean().item(),
                    "kept": " ".join(f"{name}:{count:.0f}" for name, count in report.tokens_per_tier.items() if count),
                })  # fmt: skip
                print(rows[-1], flush=True)
    show(f"{model} {dtype}: KL over {tokens} tokens after {prefill}", rows, {"rows": rows})


if __name__ == "__main__":
    typer.run(main)
