"""The options that every benchmark of an op shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="cpu or cuda")]
Threads = Annotated[int, typer.Option(min=1, help="torch's threads")]
Seconds = Annotated[float, typer.Option(help="time spent on each measurement")]
HugePages = Annotated[
    bool, typer.Option("--huge-pages", help="operands, the rivals' too, in 2 MB pages (Linux) and not as torch gives")
]
JsonOnly = Annotated[bool, typer.Option("--json", help="print the JSON line alone")]
Plot = Annotated[Path | None, typer.Option(help="PNG file to draw: time against the floor")]
Bits = Annotated[int, typer.Option(help="tier: 2, 302 (K3V2), 3, 403 (K4V3), 4, 8 or 16")]
KvLen = Annotated[int, typer.Option(min=1, help="tokens in the cache")]
KvHeads = Annotated[int, typer.Option(min=1)]
Heads = Annotated[int, typer.Option(min=1, help="query heads")]
HeadDim = Annotated[int, typer.Option(help="64, 80, 96, 128 or 256")]
Batch = Annotated[int, typer.Option(min=1)]
