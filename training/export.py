"""Put gates where they will be used: a folder (the package's own, to ship them) or the Hugging Face hub.

python -m training.export --gates runs/smollm2/gates --out smartkv_ext/gates/shipped/smollm2-135m-instruct
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from smartkv_ext.gates import Gates
from smartkv_ext.gates.lookup import FOLDER

MAX_BYTES = 8_000_000  # of gates that come with the package
PRIVATE = ("recipe",)  # of the training information: it may name folders


def export_gates(folder: Path, out: Path, name: str | None = None) -> Gates:
    """Copy gates, without the recipe's paths, and check that they come back as they were. Raises ValueError."""
    gates = Gates.from_pretrained(folder)
    recipe = gates.info.get("recipe", {})
    kept: dict[str, Any] = {k: v for k, v in gates.info.items() if k not in PRIVATE}
    kept |= {k: recipe[k] for k in ("kind", "target", "weighted", "horizon", "length", "seed") if k in recipe}
    gates.info = kept | {"base_model": name or Path(str(gates.info.get("base_model"))).name}
    gates.save_pretrained(out)
    size = sum(path.stat().st_size for path in out.iterdir())
    if out.resolve().parent == FOLDER.resolve() and size > MAX_BYTES:
        raise ValueError(f"gates must take at most {MAX_BYTES:,} bytes to ship; {str(out)!r} takes {size:,}")
    again = Gates.from_pretrained(out)
    shape = gates.model.num_layers, 1, gates.model.num_kv_heads, 8, gates.model.head_dim
    keys, values = list(torch.randn(shape)), list(torch.randn(shape))
    if not torch.allclose(gates.score(keys, values), again.score(keys, values), rtol=2e-2, atol=2e-2):
        raise ValueError(f"gates in {str(out)!r} do not score as those in {str(folder)!r}")
    return again


def main(
    gates: Annotated[Path, typer.Option(help="folder of gates")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    name: Annotated[str | None, typer.Option(help="what to call the base model")] = None,
    push: Annotated[str | None, typer.Option(help="hub id to upload to as well")] = None,
) -> None:
    """Export, and say what was written."""
    made = export_gates(gates, out, name)
    typer.echo(f"{out}: {made.num_parameters:,} parameters", err=True)
    if push:
        typer.echo(made.push_to_hub(push), err=True)


if __name__ == "__main__":
    typer.run(main)
