"""A recipe: everything that decides what a run produces. A YAML or JSON file; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from .targets import HORIZONS, TARGETS

RECIPES = Path(__file__).parent / "recipes"
DEPTH = 8  # of recipes that are like others


_NUMBERS: dict[Any, tuple[type, ...]] = {"int": (int,), "float": (int, float), "int | None": (int, type(None))}


@dataclass(frozen=True)
class Recipe:
    """Defaults are those of the small run."""

    model: str = "smollm2"
    dtype: str = "bfloat16"
    sources: Mapping[str, float] = field(default_factory=lambda: {"stdlib": 1.0})
    valid_share: float = 0.1  # of the documents; they belong to the valid split
    seed: int = 0

    # collect
    length: int = 512  # tokens of a piece; the model sees it twice
    tokens: int = 40_960  # tokens whose attention is measured, validation included
    keep: float = 1.0  # share of them that is stored
    values: bool = False  # store values too, for gates that look at both
    hidden: bool = False  # store hidden states too: they are large, and only the KVzap-style rival needs them

    # train
    kind: str = "compact"  # compact, regression or binary
    target: str = "recon_sum"  # of training.targets
    weighted: bool = False  # add log value_norm to the target
    inputs: str = "key"  # key or key_value
    hidden_size: int | None = None  # None: as the kind says
    horizon: int = 256  # binary, and what gates are evaluated on: attention from queries more than so much later ...
    threshold: float = 0.03  # ... with more than this probability
    loss: str = "mse"  # mse or huber, of regression and compact
    epochs: int = 15
    batch: int = 512  # tokens, of each head
    learning_rate: float = 5e-3
    patience: int = 4  # epochs without a better validation

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in _NUMBERS and not isinstance(value, _NUMBERS[f.type]):
                raise ValueError(f"{f.name} must be {f.type}; got {value!r}")
        for name, accepted in (
            ("kind", ("compact", "regression", "binary")), ("inputs", ("key", "key_value")), ("loss", ("mse", "huber")),
            ("target", TARGETS),
        ):  # fmt: skip
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {getattr(self, name)!r}")
        for name in ("length", "tokens", "epochs", "batch", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("valid_share", "keep"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in (0, 1]; got {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1); got {self.threshold}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0; got {self.learning_rate}")
        if self.horizon not in HORIZONS:
            raise ValueError(f"horizon must be one of {', '.join(map(str, HORIZONS))}; got {self.horizon}")
        if self.kind == "binary" and self.target != f"future_max_{self.horizon}":
            raise ValueError(
                f"target of binary gates must be future_max_{self.horizon}, as their horizon says; got {self.target!r}"
            )
        if not self.sources or min(self.sources.values()) <= 0:
            raise ValueError(f"sources must name at least one text with a weight above 0; got {dict(self.sources)}")

    @classmethod
    def load(cls, path: Path, **changes: Any) -> Recipe:
        """Read a file, or one of training/recipes by its name; ``like`` names another one that it starts from.

        Raises ValueError naming what is wrong.
        """
        known = {f.name: f.type for f in fields(cls)}
        content = _content(path, {*known, "like"})
        for _ in range(DEPTH):
            if "like" not in content:
                break
            content = _content(Path(str(content.pop("like"))), {*known, "like"}) | content
        if "like" in content:
            raise ValueError(f"recipe {str(path)!r} is like too many others")
        for name, value in content.items():  # YAML 1.1 takes 5e-3 for a word
            if known[name] == "float" and isinstance(value, str):
                with suppress(ValueError):
                    content[name] = float(value)
        return cls(**(content | changes))

    def data(self) -> dict[str, Any]:
        """The part that decides the collected data."""
        names = (
            "model", "dtype", "sources", "valid_share", "seed", "length", "tokens", "keep", "values", "hidden",
        )  # fmt: skip
        return {name: asdict(self)[name] for name in names}


def _content(given: Path, known: set[str]) -> dict[str, Any]:
    """The fields of a file, or of one of training/recipes. Raises ValueError."""
    path = given if given.is_file() else RECIPES / f"{given.name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe {str(given)!r} does not exist: name a YAML file, or one of {names}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or set(content) - known:
        unknown = sorted(map(str, set(content) - known)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"recipe {str(path)!r} must be a mapping of {', '.join(sorted(known))}; got {unknown}")
    return content
