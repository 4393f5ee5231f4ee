"""``python -m smartkv_ext``: the same as the command ``smartkv``."""

from __future__ import annotations

from smartkv_ext.cli import main

if __name__ == "__main__":
    main()
