"""KL after quantising keys and values of a real prefill: the encoders that could be in the ops, and rivals.

python -m bench.quantizer_kl --model FOLDER --text NOVEL.txt@0.5 --tokens 2048

Keys and values of all but 4 sinks and the last 128 tokens go through quantise and dequantise once
(bench/quantizers.py); KL(full || quantised) is taken over the next 256 tokens that truly follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

from bench.models import load
from bench.output import show
from bench.quantizers import minmax, paged, per_channel, refined, shifted, turbo
from smartkv_ext.eval.answer import Decoder
from smartkv_ext.eval.metrics import mean_kl
from smartkv_ext.eval.recording import Recording, record, replay
from smartkv_ext.eval.simulated import SimulatedCache
from smartkv_ext.eval.tasks.options import first_tokens, read_text
from smartkv_ext.hf import patch

Lossy = Callable[[torch.Tensor, int], tuple[torch.Tensor, float]]


def centred(x: torch.Tensor, bits: int, quantize: Lossy) -> tuple[torch.Tensor, float]:
    """Keys less the mean key of their head."""
    return shifted(x, lambda y: quantize(y, bits))


def centred_pages(x: torch.Tensor, bits: int, quantize: Lossy) -> tuple[torch.Tensor, float]:
    """Keys less the mean key of their head and of their page."""
    back: tuple[torch.Tensor, float] = paged(x, lambda y: quantize(y, bits))
    return back


def ours(steps: int, key_fit: str, value_fit: str) -> tuple[Lossy, Lossy]:
    """Refinement steps, and the last scale of keys and of values (reference.quantizer.FITS)."""
    keys = partial(centred, quantize=partial(refined, steps=steps, fit=key_fit))
    return keys, partial(refined, steps=steps, fit=value_fit)


METHODS: dict[str, tuple[Lossy, Lossy]] = {
    "least squares": ours(0, "least_squares", "least_squares"),
    "refined once": ours(1, "least_squares", "least_squares"),
    "refined": ours(3, "least_squares", "least_squares"),
    "key norm": ours(0, "norm", "least_squares"),
    "value norm": ours(0, "least_squares", "norm"),
    "both norms": ours(0, "norm", "norm"),
    "values unbiased": ours(0, "least_squares", "unbiased"),
    "key norm, values unbiased": ours(0, "norm", "unbiased"),
    "both unbiased": ours(0, "unbiased", "unbiased"),
    "refined, both norms": ours(3, "norm", "norm"),
    "refined, key norm, values unbiased": ours(3, "norm", "unbiased"),
    "page means, refined, both norms": (
        partial(centred_pages, quantize=partial(refined, fit="norm")),
        partial(refined, fit="norm"),
    ),
    "KIVI g32": (per_channel, minmax),
    "TurboQuant-style": (turbo, turbo),
    "per token g32": (minmax, minmax),
}


def lossy(quantize: Lossy, bits: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, float]]:
    """For SimulatedCache: float32 in, the cache's dtype out."""

    def through(x: torch.Tensor) -> tuple[torch.Tensor, float]:
        back, size = quantize(x.float(), bits)
        return back.to(x.dtype), size

    return through


def measure(decoder: Decoder, recording: Recording, future: torch.Tensor, chosen: list[str], bits: list[str]) -> Any:
    """A row per method and pair of bits "4,3": keys, values."""
    config, start = decoder.model.config, recording.num_tokens
    exact = DynamicCache(config=config)
    replay(recording, exact)
    truth = decoder.log_probabilities(exact, future, start)
    target = future[0, 1:, None]
    for pair in bits:
        k_bits, v_bits = map(int, pair.split(","))
        for name in chosen:
            keys, values = METHODS[name]
            group = 32 if keys is per_channel else 1
            cache = SimulatedCache(config, lossy(keys, k_bits), lossy(values, v_bits), 128, group, sinks=4)
            replay(recording, cache)
            ours = decoder.log_probabilities(cache, future, start)
            size = lossy(keys, k_bits)(recording.layers[0].k[:, :, :64])[1]
            size += lossy(values, v_bits)(recording.layers[0].v[:, :, :64])[1]
            yield {
                "method": name, "K,V bits": pair, "true bits": size / 2, "KL": mean_kl(truth, ours),
                "nll": (truth - ours)[:-1].gather(1, target).mean().item(),
                "top-1": (truth.argmax(-1) == ours.argmax(-1)).float().mean().item(),
            }  # fmt: skip


def main(
    text: Annotated[str, typer.Option(help="FILE or FILE@0.5")],
    model: str = "smollm2",
    dtype: str = "float32",
    tokens: int = 2048,
    future: int = 256,
    method: list[str] = list(METHODS),  # noqa: B006
    bits: Annotated[list[str], typer.Option(help="of keys and values")] = ["4,4", "3,3", "2,2"],  # noqa: B006
    recording: Annotated[Path | None, typer.Option(help="file that keeps the prefill for a next run")] = None,
) -> None:
    """Print the table and one JSON line."""
    start = time.process_time()
    network, tokenizer = load(model, dtype)
    ids = first_tokens(tokenizer, read_text(text), tokens + future, text)
    with patch(network), torch.no_grad():
        if recording is not None and recording.exists():
            prefill = Recording.load(recording)
            if not torch.equal(prefill.ids, ids[:, :tokens]):
                raise SystemExit(f"{recording} holds another text")
        else:
            prefill = record(network, ids[:, :tokens])
            if recording is not None:
                prefill.save(recording)
        rows = []
        for row in measure(Decoder(network, tokenizer), prefill, ids[:, tokens:], method, bits):
            rows.append(row)
            print(row, flush=True)
    seconds = time.process_time() - start
    name = f"{Path(model).name} {dtype}: KL over {future} tokens after {tokens}"
    show(name, rows, {"tokens": tokens, "cpu_seconds": seconds, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
