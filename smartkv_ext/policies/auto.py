"""auto: the best that there is for the model at hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from smartkv_ext.gates import ModelFacts, find_shipped_gates

from .base import Policy
from .delegate import Delegating
from .registry import get_policy

WITH_GATES = {"name": "union", "parts": ["gate", "keydiff"], "weights": [1, 0.2]}
WITHOUT_GATES = {"name": "union", "parts": ["keydiff", "expected_attention"]}


@dataclass(frozen=True)
class Auto(Delegating):
    """A gate with a reserve for keydiff where gates for the model come with the package, else keydiff with
    expected_attention (docs/design/quality.md, "The default").

    A cache asks at its creation, by the config, and again at its first forward, by the key projections: another model
    of the same shape gets what a model without gates gets. ``title`` names the choice, a saved cache keeps it.

    Args:
        gates: a folder or a hub id: these gates with the reserve for keydiff, or an error where they do not fit the
            model; True: those of the package; False: none; None: not chosen yet.
    """

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "gate and keydiff where the package has gates for the model, else union"
    source: ClassVar[str] = "docs/design/quality.md"
    compares_heads: ClassVar[bool] = True
    gates: str | bool | None = None
    _chosen: Policy = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.gates, str):
            gate = {"name": "gate", "gates": self.gates}
            self._take(get_policy(WITH_GATES | {"parts": [gate, "keydiff"]}))
        else:
            self._take(get_policy(WITH_GATES if self.gates else WITHOUT_GATES))

    def _take(self, chosen: Policy) -> None:
        object.__setattr__(self, "_chosen", chosen)
        self._ask_for(chosen)

    @property
    def _inner(self) -> Policy:
        return self._chosen

    def for_model(self, config: Any) -> Auto:
        gates = self.gates
        if gates is None:
            gates = find_shipped_gates(ModelFacts.from_config(config)) is not None
        made = copy.copy(self) if isinstance(gates, str) else replace(self, gates=gates)  # replace() reads files again
        made._take(made._chosen.for_model(config))
        return made

    def check_keys(self, sketch: Callable[[], torch.Tensor | None]) -> None:
        try:
            self._chosen.check_keys(sketch)
        except ValueError:  # the gates' model has the same shape and other keys
            if isinstance(self.gates, str):  # asked for by name
                raise
            object.__setattr__(self, "gates", False)
            self._take(get_policy(WITHOUT_GATES))

    @property
    def title(self) -> str:
        return f"{self.name}: {self._chosen.title}"
