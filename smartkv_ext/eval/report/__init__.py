"""`smartkv report`: one HTML file from the rows of `smartkv eval`. Needs matplotlib and jinja2."""

from .page import write_report

__all__ = ["write_report"]
