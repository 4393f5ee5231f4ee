"""The commands and their options. torch and transformers are imported inside, so that --help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .errors import CliError, command

app = typer.Typer(
    name="smartkv",
    help="A key-value cache that is small for real: answers over long documents within a byte budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import smartkv_ext

        typer.echo(f"smartkv {smartkv_ext.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """A key-value cache that is small for real: answers over long documents within a byte budget."""


Model = Annotated[str, typer.Option(help='"smollm2" (embedded), a model folder, or a hub id.')]
Budget = Annotated[
    str,
    typer.Option(help='What the cache may hold: a share of the full bf16 cache (1/8), "64MB", "4bits", or "none".'),
]
PolicyName = Annotated[
    str, typer.Option("--policy", help="Which tokens matter: see `smartkv policies`; or a JSON or YAML file.")
]
Tiers = Annotated[
    str | None,
    typer.Option(
        help="Bits of packed tokens, of 2, K3V2 (keys 3, values 2), 3, K4V3, 4, 8, 16; default K3V2,K4V3,4,8,16, and "
        "2 as well under a policy that evicts nothing."
    ),
]
Window = Annotated[int, typer.Option(help="Newest tokens, never packed; fewer under a small budget.")]
Sinks = Annotated[int, typer.Option(help="First tokens, never packed.")]
Scope = Annotated[str, typer.Option(help="Who decides about a token: head, layer or global.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Dtype = Annotated[str, typer.Option(help="auto (that of the checkpoint), float32, bfloat16 or float16.")]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens of the document per forward pass: fewer need less memory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON; what people read goes to stderr.")]


def parse_tiers(text: str | None) -> tuple[str, ...] | None:
    """Tiers from text such as "K3V2,4,8". Whether a cache can have them is for the cache to say."""
    return None if text is None else tuple(text.split(","))


@app.command()
@command
def generate(
    document: Annotated[str, typer.Option(help='A text file, or "-" for stdin.')],
    question: Annotated[str, typer.Option(help="Asked after the document has been compressed.")],
    model: Model = "smollm2",
    budget: Budget = "0.125",
    policy: PolicyName = "auto",
    tiers: Tiers = None,
    window: Window = 128,
    sinks: Sinks = 4,
    scope: Scope = "head",
    max_new_tokens: MaxNewTokens = 128,
    chunk: Chunk = 4096,
    dtype: Dtype = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the full cache too.")] = False,
    as_json: Json = False,
) -> None:
    """Answer a question about a document. The cache is compressed before the question is seen."""
    from .prompt import read_document
    from .session import Session

    session = Session.create(
        model, dtype, budget=budget, policy=policy, tiers=parse_tiers(tiers), window=window, sinks=sinks, scope=scope,
        max_new_tokens=max_new_tokens, chunk=chunk, as_json=as_json,
    )  # fmt: skip
    text = read_document(document)
    session.load()
    result = session.answer(text, question, compare=compare)
    if as_json:
        typer.echo(json.dumps(result))


@app.command()
@command
def demo(
    model: Model = "smollm2",
    budget: Budget = "0.125",
    policy: PolicyName = "auto",
    tiers: Tiers = None,
    window: Window = 128,
    scope: Scope = "head",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Hide a note in Python's language reference, compress to 1/8, then ask for it.

    The settings are those of generate: nothing is tuned to the note.
    """
    from .demo import run_demo
    from .session import Session

    session = Session.create(
        model, dtype, budget=budget, policy=policy, tiers=parse_tiers(tiers), window=window, scope=scope,
        max_new_tokens=48, one_line=True, as_json=as_json,
    )  # fmt: skip
    result = run_demo(session)
    if as_json:
        typer.echo(json.dumps(result))


@app.command("eval")
@command
def evaluate(
    out: Annotated[Path, typer.Option(help="JSONL file; rows that it has already are not measured again.")],
    task: Annotated[list[str], typer.Option(help="What to measure; may be repeated.")] = ["text", "recall"],  # noqa: B006
    method: Annotated[
        list[str], typer.Option(help='Such as "smartkv policy=snapkv", "uniform bits=4", "full"; may be repeated.')
    ] = ["full", "smartkv"],  # noqa: B006
    budget: Annotated[list[str], typer.Option(help="For every method that takes one; may be repeated.")] = ["0.25"],  # noqa: B006
    data: Annotated[Path | None, typer.Option(help="Folder with the files of tasks that need some.")] = None,
    text: Annotated[
        list[str], typer.Option(help="Text file, or FILE@0.5 from its middle on; none: Python's language reference.")
    ] = [],  # noqa: B006
    length: Annotated[list[int], typer.Option(min=64, help="Tokens of a document; may be repeated.")] = [2048],  # noqa: B006
    samples: Annotated[int, typer.Option(min=1, help="Documents of each kind.")] = 1,
    subtask: Annotated[list[str], typer.Option(help="Of RULER or LongBench; none: all.")] = [],  # noqa: B006
    query_aware: Annotated[bool, typer.Option("--query-aware", help="Compress the question too.")] = False,
    maps: Annotated[bool, typer.Option("--maps", help="Write which token each head kept, for the report.")] = False,
    model: Model = "smollm2",
    dtype: Dtype = "auto",
) -> None:
    """Compare caches at equal true bytes: perplexity, KL, recall and tasks, one JSON line per measurement."""
    from .evaluate import run

    options = {"data": data, "texts": tuple(text), "lengths": tuple(length), "samples": samples}
    options["subtasks"] = tuple(subtask)
    run(model, dtype, out, task, method, budget, options, {"query_aware": query_aware, "maps": maps})


@app.command()
@command
def report(
    rows: Annotated[list[Path], typer.Argument(help="JSONL files that `smartkv eval` has written.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page: curves, tables, heat maps, and every token's fate."""
    from .evaluate import report as write

    write(rows, out)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@app.command()
@command
def doctor(as_json: Json = False) -> None:
    """Versions, kernels, CUDA, and a self-test: a tiny model of every supported type. Exit code 1 if something is
    broken."""
    from .doctor import examine, facts_table

    with Console(stderr=True).status("testing the kernels and a tiny model of every supported type"):
        facts = examine()
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        Console(highlight=False).print(facts_table(facts))
    if facts["problems"]:
        raise CliError(facts["problems"][0])


@app.command()
@command
def policies(as_json: Json = False) -> None:
    """The policies that --policy accepts."""
    from .tables import policy_rows, policy_table

    rows = policy_rows()
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        Console().print(policy_table(rows))
