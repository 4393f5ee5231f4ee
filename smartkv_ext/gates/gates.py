"""Gates: the stacked weights of all layers and heads, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from smartkv_ext import ops

from . import files
from .key_basis import KeyBasis
from .model import MIN_COSINE, SKETCH_SIZE, ModelFacts, sketch_cosine

KINDS = ("compact", "regression", "binary")
INPUTS = ("key", "key_value")
NUM_QUANTILES = 257


def score_quantiles(scores: torch.Tensor) -> torch.Tensor:
    """``quantiles`` of Gates, from scores of any shape. torch.quantile takes 16 million of them at most."""
    steps = numpy.linspace(0, 1, NUM_QUANTILES)
    return torch.from_numpy(numpy.quantile(scores.flatten().double().numpy(), steps)).float()


class Gates:
    """One MLP per (layer, KV head): linear, ReLU, (linear, ReLU,) linear. Immutable.

    What a score means depends on the kind: "compact" and "regression" give the value that they were trained on (the
    natural log of attention, or log4 of a lifespan), "binary" the log-odds that the token is attended to much later.

    Args:
        weights: 2 or 3 tensors (num_layers, num_kv_heads, out, in); the last has out = 1.
        biases: as many (num_layers, num_kv_heads, out).
        model: the model they were trained on.
        kind: one of KINDS.
        inputs: "key": the pre-RoPE key; "key_value": the key and then the value.
        sketch: ``key_sketch`` of that model; None: its weights are not checked.
        quantiles: (NUM_QUANTILES,) scores of all layers and heads on held-out text at even steps from 0 to 1, None:
            unknown.
        layer_shares: (num_layers,) how the layers' pages should weigh, mean 1; None: evenly.
        decay: (num_layers, num_kv_heads) exponent with which a head's attention falls with distance; None: unknown.
        calibration: (num_layers, num_kv_heads, 2) slope a and offset b of each head, a > 0: a token of score s matters
            much later with the probability sigmoid(a s + b), as found on held-out text; None: unknown.
        key_basis: (num_layers, num_kv_heads, head_dim + 1, head_dim) ``KeyBasis`` of the model's keys; None: none.
        info: JSON values about the training.
        source: the folder or hub id they came from.

    Raises ValueError naming what does not fit.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], model: ModelFacts, kind: str = "compact",
        inputs: str = "key", sketch: torch.Tensor | None = None, quantiles: torch.Tensor | None = None,
        layer_shares: torch.Tensor | None = None, decay: torch.Tensor | None = None,
        calibration: torch.Tensor | None = None, key_basis: torch.Tensor | None = None,
        info: dict[str, Any] | None = None, source: str | None = None,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if inputs not in INPUTS:
            raise ValueError(f"inputs must be one of {', '.join(INPUTS)}; got {inputs!r}")
        self.weights = [x.float().contiguous() for x in weights]
        self.biases = [x.float().contiguous() for x in biases]
        self.model, self.kind, self.inputs, self.source = model, kind, inputs, source
        self.info = info or {}
        self.sketch = None if sketch is None else sketch.float()
        self.quantiles = None if quantiles is None else quantiles.float()
        self.layer_shares = None if layer_shares is None else layer_shares.float()
        self.decay = None if decay is None else decay.float()
        self.calibration = None if calibration is None else calibration.float()
        self.basis = None if key_basis is None else KeyBasis(key_basis)
        self._check()
        self._placed: dict[tuple[str, int, int], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def _check(self) -> None:
        if len(self.weights) not in (2, 3) or len(self.biases) != len(self.weights):
            raise ValueError(
                f"gates must have 2 or 3 weights and as many biases; got {len(self.weights)} and {len(self.biases)}"
            )
        stack, width = (self.model.num_layers, self.model.num_kv_heads), self.input_size
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = 1 if i + 1 == len(self.weights) else weight.shape[2] if weight.dim() == 4 else 0
            if weight.shape != (*stack, out, width) or bias.shape != (*stack, out):
                raise ValueError(
                    f"weights[{i}] and biases[{i}] must be {(*stack, out, width)} and {(*stack, out)}; "
                    f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
                )
            if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all())):
                raise ValueError(f"weights[{i}] and biases[{i}] must be finite numbers")
            width = out
        for name, x, shape in (
            ("quantiles", self.quantiles, (NUM_QUANTILES,)), ("layer_shares", self.layer_shares, stack[:1]),
            ("decay", self.decay, stack), ("calibration", self.calibration, (*stack, 2)),
            ("sketch", self.sketch, (stack[0], SKETCH_SIZE)),
            ("key_basis", self.key_basis, (*stack, self.model.head_dim + 1, self.model.head_dim)),
        ):  # fmt: skip
            if x is not None and x.shape != shape:
                raise ValueError(f"{name} must be {shape}; got {tuple(x.shape)}")
            if x is not None and not bool(x.isfinite().all()):
                raise ValueError(f"{name} must be finite numbers")
        shares = self.layer_shares
        if shares is not None and (bool((shares < 0).any()) or not 0.99 < float(shares.mean()) < 1.01):
            raise ValueError(
                f"layer_shares must be at least 0 and average 1; got {shares.min():.3g} to {shares.max():.3g}"
            )
        if self.quantiles is not None and bool((self.quantiles.diff() < 0).any()):
            raise ValueError("quantiles must not fall")
        if self.decay is not None and bool((self.decay < 0).any()):
            raise ValueError("decay must be at least 0: no head prefers old tokens for their age")
        if self.calibration is not None and not bool((self.calibration[..., 0] > 0).all()):
            raise ValueError("calibration must have slopes above 0")

    @property
    def key_basis(self) -> torch.Tensor | None:
        """``basis`` as one tensor."""
        return None if self.basis is None else self.basis.packed

    @property
    def input_size(self) -> int:
        """Numbers that a gate looks at."""
        return self.model.head_dim * (2 if self.inputs == "key_value" else 1)

    @property
    def num_parameters(self) -> int:
        """Of all gates together."""
        return sum(x.numel() for x in (*self.weights, *self.biases))

    @property
    def num_bytes(self) -> int:
        """Memory of the weights."""
        return 4 * self.num_parameters

    def score(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor] | None = None, first_layer: int = 0,
        first_head: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        """Score tokens of consecutive layers in one call of ops.gate_score.

        Args:
            keys: per layer (batch, num_kv_heads, n, head_dim) before RoPE, one dtype and device.
            values: the same for gates that look at values.
            first_layer: the layer of keys[0].
            first_head: the model's KV head of keys[0][:, 0] (tensor parallel).

        Returns:
            (len(keys), batch, num_kv_heads, n) float32, higher = keep.
        """
        if self.inputs == "key_value":
            assert values is not None, "gates of keys and values need both"
            keys = [torch.cat([k, v], -1) for k, v in zip(keys, values, strict=True)]
        weights, biases = self._on(keys[0].device, first_head, keys[0].shape[1])
        layers = slice(first_layer, first_layer + len(keys))
        return ops.gate_score(list(keys), [x[layers] for x in weights], [x[layers] for x in biases])

    def _on(self, device: torch.device, first: int, heads: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Weights and biases of some heads on a device: copied once."""
        where = (str(device), first, heads)
        if where not in self._placed:
            mine = slice(first, first + heads)
            self._placed[where] = (
                [x[:, mine].to(device).contiguous() for x in self.weights],
                [x[:, mine].to(device).contiguous() for x in self.biases],
            )
        return self._placed[where]

    def threshold(self, retention: float) -> float:
        """The score that a share ``retention`` of the tokens reaches, over all layers and heads of held-out text.

        Raises ValueError for gates that were never calibrated.
        """
        if not 0 < retention <= 1:
            raise ValueError(f"retention must lie in (0, 1]; got {retention}")
        if self.quantiles is None:
            raise ValueError("these gates have no quantiles: calibrate them on a text first (smartkv evaluate)")
        place = (1 - retention) * (NUM_QUANTILES - 1)
        low = min(int(place), NUM_QUANTILES - 2)
        a, b = self.quantiles[low].item(), self.quantiles[low + 1].item()
        return a + (b - a) * (place - low)

    def probability_score(self, p: float) -> torch.Tensor:
        """(num_layers, num_kv_heads) the score at which each head says ``p``.

        Raises ValueError for gates that were never calibrated.
        """
        if not 0 < p < 1:
            raise ValueError(f"probability must lie in (0, 1); got {p}")
        if self.calibration is None:
            raise ValueError("these gates have no calibration: their scores are no probabilities (smartkv evaluate)")
        slope, offset = self.calibration.unbind(-1)
        return (torch.logit(torch.tensor(p, dtype=torch.float32)) - offset) / slope

    def check_model(self, facts: ModelFacts) -> None:
        """Raise ValueError if the gates belong to a model of another shape."""
        difference = self.model.difference(facts)
        if difference:
            raise ValueError(f"gates{self._named} belong to another model: this one has {difference}")

    def check_sketch(self, sketch: torch.Tensor) -> None:
        """Raise ValueError if the gates belong to a model of the same shape but other weights."""
        if self.sketch is not None and (cosine := sketch_cosine(self.sketch, sketch)) < MIN_COSINE:
            raise ValueError(
                f"gates{self._named} belong to another model of the same shape: the key projections agree to "
                f"{cosine:.2f}, and at least {MIN_COSINE} is wanted; train gates for this model (smartkv train)"
            )

    @property
    def _named(self) -> str:
        return f" {self.source!r}" if self.source else ""

    def __deepcopy__(self, memo: Any) -> Gates:
        return self  # immutable: copies of a cache share them

    # -- files -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write smartkv_gates.safetensors and smartkv_config.json: weights in ``dtype``, biases in float32."""
        files.save(self, Path(folder), dtype)

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub: Any) -> Gates:
        """Read a folder or a hub id; ``hub``: revision, token, cache_dir, subfolder of huggingface_hub.

        Raises ValueError for what is missing, damaged, newer, or not a gate file.
        """
        return files.load(cls, name, **hub)

    def push_to_hub(self, repo_id: str, **hub: Any) -> str:
        """Upload to the Hugging Face hub; ``hub``: token, private, commit_message. Returns the commit's address."""
        return files.push(self, repo_id, **hub)
