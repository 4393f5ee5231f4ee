"""How the bytes of a cache should be split over the layers: a calibration run, written as a policy map.

python -m training.layer_shares --text BOOK.txt --text OTHER.txt@0.5 --policy snapkv --export shares.json
smartkv generate --policy shares.json ...
python -m training.layer_shares --model MODEL --gates runs/MODEL/gates      writes the shares into the gates

One layer at a time holds its tokens in ``budget`` of its bytes while all others are exact; D_l is the KL divergence
that this alone costs. With losses that add up over the layers and fall like bytes ** -slope, the least sum under one
budget has bytes_l ~ D_l ** (1 / (1 + slope)) (Lagrange). Of several texts each counts the same. Shares stay within 1/4
and 4 of an even split.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.models import load
from bench.output import show
from smartkv_ext import SmartKVCache, patch
from smartkv_ext.eval.answer import Decoder
from smartkv_ext.eval.metrics import mean_kl
from smartkv_ext.eval.recording import Recording, record, replay
from smartkv_ext.eval.tasks.options import first_tokens, language_reference, read_text
from smartkv_ext.gates import Gates
from smartkv_ext.hf.gate_check import sketch_of
from smartkv_ext.policies import get_policy

EXTREME = 4.0  # no layer gets more than this many times an even share, or less than its inverse


def shares(losses: torch.Tensor, slope: float) -> torch.Tensor:
    """losses (layers,) -> (layers,) shares of mean 1.

    In bfloat16 any change of a layer costs some KL, by rounding alone: half of the least loss is taken off all.
    """
    weight = (losses - losses.min() / 2).clamp(min=losses.max() * 1e-4) ** (1 / (1 + slope))
    found = weight / weight.mean()
    for _ in range(16):  # clamping moves the mean, and scaling back moves what was clamped
        found = found.clamp(1 / EXTREME, EXTREME)
        found = found / found.mean()
    return found


def mean_profile(losses: list[torch.Tensor]) -> torch.Tensor:
    """Losses (layers,) of several texts -> (layers,): a text that loses more at every layer counts no more for it."""
    return torch.stack([x / x.sum() for x in losses]).mean(0)


def policy_map(found: torch.Tensor, policy: str) -> dict[str, Any]:
    """A map in which every layer follows ``policy`` with its share."""
    return {"version": 1, "default": policy, "shares": [round(x, 3) for x in found.tolist()]}


@torch.no_grad()
def layer_losses(model: Any, tokenizer: Any, recording: Recording, future: torch.Tensor, **arguments: Any) -> Any:
    """(layers,) KL over the tokens ``future`` (1, n) when one layer alone is compressed as ``arguments`` say."""
    decoder, start = Decoder(model, tokenizer), recording.num_tokens
    exact = SmartKVCache(model.config, budget=None, policy=arguments["policy"], window=start + future.shape[1] + 1)
    packed = SmartKVCache(model.config, **arguments)
    for cache in (exact, packed):
        cache.check_keys(lambda: sketch_of(model))  # as the forward that is replayed did
        replay(recording, cache)
    truth = decoder.log_probabilities(copy.deepcopy(exact), future, start)
    losses = []
    for i in range(len(exact.layers)):
        mixed = copy.deepcopy(exact)
        mixed.layers[i] = copy.deepcopy(packed.layers[i])
        losses.append(mean_kl(truth, decoder.log_probabilities(mixed, future, start)))
    return torch.tensor(losses)


def main(
    text: Annotated[
        list[str] | None, typer.Option(help="FILE or FILE@0.5, may be repeated; default: Python's language reference")
    ] = None,
    export: Annotated[Path | None, typer.Option(help="policy map to write; needed without --gates")] = None,
    model: str = "smollm2",
    dtype: str = "float32",
    policy: Annotated[
        str | None, typer.Option(help="what all layers follow; default: gate with --gates, else snapkv")
    ] = None,
    budget: Annotated[float, typer.Option(help="fraction that each layer in turn is given", min=0.01, max=1)] = 0.0625,
    slope: Annotated[float, typer.Option(help="how loss falls with bytes, as a power", min=0.1)] = 1.0,
    tokens: int = 4096,
    future: int = 128,
    gates: Annotated[Path | None, typer.Option(help="gate folder that the shares go to; policy gate uses it")] = None,
) -> None:
    """Print a row per layer and write the map; last line JSON."""
    start = time.process_time()
    if export is None and gates is None:
        raise typer.BadParameter("name a map to write with --export, or gates that the shares go to with --gates")
    policy = policy or ("snapkv" if gates is None else "gate")
    learned = None if gates is None else Gates.from_pretrained(gates)
    followed = get_policy(policy)
    if learned is not None:
        learned.layer_shares = None  # of an earlier run
        followed = get_policy(policy, gates=learned) if policy == "gate" else followed
    network, tokenizer = load(model, dtype)
    every = []
    with patch(network):
        for name in text or [None]:
            words = language_reference() if name is None else read_text(name)
            ids = first_tokens(tokenizer, words, tokens + future, name or "reference")
            prefill = record(network, ids[:, :tokens])
            every.append(layer_losses(network, tokenizer, prefill, ids[:, tokens:], budget=budget, policy=followed))
    losses = torch.stack(every).mean(0)
    found = shares(mean_profile(every), slope)
    content = policy_map(found, policy)
    get_policy("map", **content).check(len(found), network.config.num_key_value_heads)
    if export is not None:
        export.write_text(json.dumps(content, indent=2) + "\n")
    if gates is not None and learned is not None:
        learned.layer_shares = found
        learned.save_pretrained(gates)
    rows = [{"layer": i, "KL alone": x, "share": y} for i, (x, y) in enumerate(zip(losses, found, strict=True))]
    rows = [{name: float(x) for name, x in row.items()} for row in rows]
    result = {"losses": losses.tolist(), "shares": found.tolist(), "cpu_seconds": time.process_time() - start}
    show(f"{Path(model).name}: what one compressed layer costs at {budget} ({policy})", rows, result)


if __name__ == "__main__":
    typer.run(main)
