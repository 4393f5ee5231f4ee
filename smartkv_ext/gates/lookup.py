"""Gates that come with the package, found by the model they belong to."""

from __future__ import annotations

import functools
from pathlib import Path

from .gates import Gates
from .model import ModelFacts

FOLDER = Path(__file__).parent / "shipped"


def _folders() -> list[Path]:
    return sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []


@functools.cache
def find_shipped_gates(facts: ModelFacts) -> Gates | None:
    """The shipped gates of a model of this shape, if there are any."""
    for folder in _folders():
        gates = Gates.from_pretrained(folder)
        if not gates.model.difference(facts):
            return gates
    return None


def shipped_gates(facts: ModelFacts) -> Gates:
    """The same. Raises ValueError if there are none."""
    gates = find_shipped_gates(facts)
    if gates is not None:
        return gates
    names = ", ".join(folder.name for folder in _folders())
    raise ValueError(
        f"no gates for this model come with the package (there are some for {names or 'none'}): train them "
        "(smartkv train) and name their folder, as in policy {'name': 'gate', 'gates': FOLDER}"
    )
