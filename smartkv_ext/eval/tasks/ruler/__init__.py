"""RULER (Hsieh et al. 2024): 13 synthetic tasks of a chosen length, generated as NVIDIA/RULER does.

Where its behaviour looks like a mistake, ours differs as said at the place; prompts come from the data folder's
ruler/templates.json.
"""

from .tasks import RULER_TASKS, ruler

__all__ = ["RULER_TASKS", "ruler"]
