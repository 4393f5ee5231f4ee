"""Pictures as SVG text."""

from __future__ import annotations

import io
import math
from typing import Any

import torch

from .data import Summary, label
from .maps import KeptMap

COLOURS = ("#0b6e99", "#c4472b", "#3f7d2a", "#8a4fa3", "#b8860b", "#d0578c", "#2f4b7c", "#5f5f5f")
TIER_COLOURS = {
    0: "#e8e8e8", 2: "#e8a33d", 2.5: "#e0b943", 3: "#d8cf4a", 3.5: "#a2c154", 4: "#6cb35f", 8: "#3b8fc2", 16: "#24476b",
}  # fmt: skip
LABELS = {"kl": "KL (nats per token)", "perplexity": "perplexity", "recall": "planted facts recalled"}


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    return Figure(figsize=(width, height), layout="constrained")


def readable_ticks(low: float, high: float) -> list[float]:
    """Ticks of a log axis from low to high, both > 0: 1, 2, 5 times powers of ten, powers alone over a wide range, even
    steps over a narrow one."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if 3 <= len(ticks) <= 9:
            return ticks
    if len(ticks) > 9:
        return ticks[:: -(-len(ticks) // 9)]
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def pareto(found: list[Summary], name: str, families: list[str]) -> str:
    """A column against bytes: notable families in colour, joined over their budgets or bits; the rest in grey."""
    figure = _figure(6.2, 4.6)
    axes = figure.add_subplot()
    curves: dict[str, list[tuple[float, float]]] = {}
    for s in found:
        if name in s.values and s.method != "full":
            curves.setdefault(s.family, []).append((s.ratios[name], s.values[name]))
    for family, points in curves.items():
        if family not in families:
            axes.plot(*zip(*sorted(points), strict=True), color="#c8c8c8", marker=".", lw=0.8, ms=4, zorder=1)
    for colour, family in zip(COLOURS, families, strict=False):
        if family in curves:
            points = sorted(curves[family])
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, marker="o", lw=1.6, ms=4.5, label=label(family), zorder=2)
    full = [s.values[name] for s in found if s.method == "full" and name in s.values]
    if full and name != "kl":
        axes.axhline(full[0], color="black", lw=1, ls=":", label="full cache")
    axes.set_xscale("log", base=2)
    ticks = [2.0**-i for i in range(6)]
    axes.set_xticks(ticks, [f"1/{2**i}" if i else "1" for i in range(6)])
    if name in ("kl", "perplexity"):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        ticks = readable_ticks(low, high)
        axes.set_yticks(ticks, [f"{tick:.6g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_ylim(low, high)
    else:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("true bytes / bytes of the full bf16 cache")
    axes.set_ylabel(LABELS.get(name, f"{name} score"))
    axes.grid(True, which="major", color="#eeeeee")
    figure.legend(loc="outside lower center", ncols=1, fontsize=8, frameon=False)
    return _svg(figure)


def kept_per_head(kept: KeptMap) -> str:
    """Layers across, heads up: share of the tokens that each head holds."""
    share = kept.kept_share().T
    figure = _figure(6.2, 1.1 + 0.22 * share.shape[0])
    axes = figure.add_subplot()
    image = axes.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=float(share.max()) or 1, origin="lower")
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.set_yticks(range(share.shape[0]))
    figure.colorbar(image, ax=axes, label="share kept", pad=0.01)
    return _svg(figure)


def tiers_per_layer(kept: KeptMap) -> str:
    """Stacked shares of tokens by bits."""
    figure = _figure(6.2, 2.6)
    axes = figure.add_subplot()
    bottom = torch.zeros(kept.bits.shape[0])
    for bits, share in kept.tier_shares().items():
        label = "evicted" if bits == 0 else f"{bits:g} bit" if bits < 16 else "16 bit and window"
        axes.bar(range(len(share)), share, bottom=bottom, width=1.0, color=TIER_COLOURS.get(bits), label=label)
        bottom += share
    axes.set_xlabel("layer")
    axes.set_ylabel("share of tokens")
    axes.set_xlim(-0.5, kept.bits.shape[0] - 0.5)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return _svg(figure)
