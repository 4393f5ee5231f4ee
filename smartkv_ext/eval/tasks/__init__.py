"""Tasks by name: what documents a run goes through."""

from .options import TaskOptions
from .registry import TASKS, get_documents

__all__ = ["TASKS", "TaskOptions", "get_documents"]
