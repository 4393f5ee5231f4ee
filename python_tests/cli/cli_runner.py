"""Call the command line inside the test process."""

from typer.testing import CliRunner

from smartkv_ext.cli import training  # noqa: F401  # its commands
from smartkv_ext.cli.app import app

DOCUMENT = "\n\n".join(f"Paragraph {i} speaks of the number {i * i} and of nothing else." for i in range(60))


def call(*args, **kwargs):
    return CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)


def ask(folder, document, *args, **kwargs):
    return call("generate", "--model", folder, "--document", document, "--question", "Which number?", *args, **kwargs)
