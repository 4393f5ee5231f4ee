"""Gates that come with the package, found by the model they belong to."""

from __future__ import annotations

import functools
from pathlib import Path

from .gates import Gates
from .model import ModelFacts

FOLDER = Path(__file__).parent / "shipped"


@functools.cache
def shipped_gates(facts: ModelFacts) -> Gates:
    """The shipped gates of a model of this shape. Raises ValueError if there are none."""
    names = []
    for folder in sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []:
        gates = Gates.from_pretrained(folder)
        names.append(f"{folder.name}")
        if not gates.model.difference(facts):
            return gates
    raise ValueError(
        f"no gates for this model come with the package (there are some for {', '.join(names) or 'none'}): train them "
        "(smartkv train) and name their folder, as in policy {'name': 'gate', 'gates': FOLDER}"
    )
