"""Attention reconstruction error of every policy on synthetic attention patterns (training/synthetic.py).

python -m bench.synthetic_eviction
"""

from __future__ import annotations

import time
from typing import Any

import typer

from bench.output import show
from smartkv_ext.policies import POLICIES, Policy, get_policy
from training.reconstruction import RETENTIONS, Trace, reconstruction_errors
from training.synthetic import SPLITS, Pattern, digest, generate_traces

BONUSES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
ABLATIONS = ("layer_term", "position_term", "recency_term", "norm_term")
# Ideas that were rejected on the way to layer_aware, as far as their names tell: the formulas were never published.
_WEIGHTED = "cumulative * ((position + 1) / seq_len) ** 0.3"
_FRESH = "(0.15 + 0.1 * layer) * max(0, 1 - age / 128)"
REJECTED = {
    "multiplicative": f"recent * {_WEIGHTED} * (1 + {_FRESH})",
    "entropy": (
        f"-0.6 * recent / 32 * log(recent / 32) - 0.4 * cumulative / (age + 1) * log(cumulative / (age + 1)) + {_FRESH}"
    ),
    "temperature": f"0.6 * recent ** 0.5 + 0.4 * ({_WEIGHTED}) ** 0.5 + {_FRESH}",
    "many terms": (
        f"(0.5 - 0.3 * layer) * recent + 0.2 * layer * cumulative + 0.2 * (1 - layer) * {_WEIGHTED} + {_FRESH}"
        " + 0.2 * layer * exp(-age / 64) + 0.1 * sqrt(recent) - 0.2 * layer * min(key_norm, 2)"
        " + 0.1 * (1 - layer) * (position + 1) / seq_len"
    ),
}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def measure(name: str, policy: Policy, splits: dict[str, list[Trace]], window: int) -> dict[str, Any]:
    """A row: mean error per split, and the retentions of the last split."""
    errors = {split: reconstruction_errors(policy, traces, window=window) for split, traces in splits.items()}
    last = list(splits)[-1]
    row: dict[str, Any] = {"policy": name} | {split: mean(values) for split, values in errors.items()}
    row |= {f"{last} {100 * r:.0f} %": x for r, x in zip(RETENTIONS, errors[last], strict=True)}
    row["heads compete"] = mean(reconstruction_errors(policy, splits[last], window=window, shared=True))
    return row


def candidates() -> dict[str, Policy]:
    """Every policy that evicts by a score of its own, and variants."""
    names = [name for name, kind in POLICIES.items() if name not in ("full", "map", "evolved") and not kind.scores_keys]
    chosen = {name: get_policy(name) for name in names}
    chosen |= {"hybrid, no bonus": get_policy("hybrid", bonus=0.0), "evolved": get_policy("evolved")}
    return chosen


def main(window: int = 4) -> None:
    """Print the policies, the bonus of hybrid, the ablation of layer_aware and the rejected ideas; last line JSON."""
    start = time.perf_counter()
    splits = {split: generate_traces(split) for split in SPLITS}
    rows = [measure(name, policy, splits, window) for name, policy in candidates().items()]
    train = {"train": splits["train"]}
    bonuses = [
        {"bonus": bonus, "train": measure("", get_policy("hybrid", bonus=bonus), train, window)["train"]}
        for bonus in BONUSES
    ]
    reference = measure("layer_aware", get_policy("layer_aware"), splits, window)
    parts = [reference] + [
        measure(f"without {term}", get_policy("layer_aware", **{term: False}), splits, window) for term in ABLATIONS
    ]
    baselines = {
        name: measure(name, policy, splits, window) for name, policy in candidates().items() if "hybrid" in name
    }
    rejected = [reference] + [
        measure(name, get_policy("evolved", expression=text), splits, window) for name, text in REJECTED.items()
    ]
    result = {
        "pattern": vars(Pattern()), "digests": {split: digest(split) for split in SPLITS}, "policies": rows,
        "hybrid_bonus": bonuses, "ablation": parts, "rejected": rejected,
        "improvement over": {
            name: {split: 1 - reference[split] / row[split] for split in SPLITS} for name, row in baselines.items()
        },
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
    show("hybrid: size of the recency bonus, error on TRAIN", bonuses, {"bonuses": bonuses})
    show("layer_aware without one component", parts, {"ablation": parts})
    show("ideas that layer_aware's authors rejected, in our reading", rejected, {"rejected": rejected})
    show("attention reconstruction error, mean over 25, 50 and 75 % retention", rows, result)


if __name__ == "__main__":
    typer.run(main)
