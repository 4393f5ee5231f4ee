"""The document of ``smartkv demo``: Python's own language reference with a note hidden in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CliError

if TYPE_CHECKING:
    from .run import Settings
    from .session import Session

TOPICS = ("execmodel", "with", "class", "exceptions", "raise", "for", "while")  # in this order, then cut to NUM_TOKENS
NUM_TOKENS = 3000  # SmolLM2-135M finds the note with its full cache here, and no longer does at 6,000
NOTE_AT = 0.2  # of the document
NOTE = "Note: Anna's favourite fruit is mango."
QUESTION = "What is Anna's favourite fruit?"
# Measured with SmolLM2-135M and the default settings. Whoever changes those measures this again (docs/LOG.md).
BEST_CASE = (
    "A best case: the note was picked because the small model answers. Of 12 notes it found 9 with its full cache, and "
    "5 of them after compression to an eighth."
)
ANSWER = "mango"  # what a right answer contains


def language_reference(tokenizer: Any, num_tokens: int) -> str:
    """The first ``num_tokens`` tokens of TOPICS: their text differs between Python versions, their length must not."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions strip it from the standard library
        raise CliError("this Python has no pydoc_data.topics, the demo's document: use `smartkv generate`") from None
    text = "\n\n".join(topics[name].strip() for name in TOPICS if name in topics)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    cut: str = tokenizer.decode(ids[:num_tokens], skip_special_tokens=True)
    return cut[: cut.rindex("\n")] if len(ids) > num_tokens else cut


def plant(text: str, note: str, at: float = NOTE_AT) -> str:
    """``text`` with ``note`` as a paragraph of its own, at the first break after the share ``at`` of it."""
    place = text.find("\n\n", int(at * len(text)))
    place = len(text) if place < 0 else place
    return f"{text[:place]}\n\n{note}{text[place:]}"


def run_demo(session: Session) -> dict[str, Any]:
    """Say what is shown, show it, say what came out. Returns what --json prints."""
    session.load()
    document = plant(language_reference(session.tokenizer, NUM_TOKENS), NOTE)
    session.out.print(_introduction(session.settings), markup=False)
    result = session.answer(document, QUESTION, compare=True)
    result["note"] = NOTE
    for name in ("smartkv", "full"):
        result[name]["right"] = ANSWER.lower() in result[name]["text"].lower()
    session.out.print(_conclusion(result), markup=False)
    return result


def _introduction(settings: Settings) -> str:
    budget = "no limit" if settings.budget is None else f"budget {settings.budget}"
    return (
        f"The document: about {NUM_TOKENS:,} tokens of Python's language reference. One fifth into it stands a note:"
        f"\n\n  {NOTE}\n\n"
        f"The model reads it once, and its key-value cache is compressed ({budget}, policy {settings.policy}, "
        f"{' or '.join(settings.tier_names)} bits a value, scope {settings.scope}) before the question is known:"
        f"\n\n  {QUESTION}\n\nThen the same with the full cache.\n\n{BEST_CASE}\n"
    )


def _conclusion(result: dict[str, Any]) -> str:
    knows = {
        (True, True): "Both caches know what the note says.",
        (True, False): "The full cache knows what the note says, the compressed cache has lost it.",
        (False, True): "The compressed cache knows what the note says, the full cache does not.",
        (False, False): "Neither cache knows what the note says: this model cannot find it.",
    }[result["full"]["right"], result["smartkv"]["right"]]
    report, whole = result["smartkv"]["after_answer"], result["full"]["after_answer"]
    return (
        f"{knows} The compressed cache holds {report['total_bytes']:,} bytes, {100 * report['ratio']:.1f} % of a bf16 "
        f"cache of the same tokens; the full cache holds {whole['total_bytes']:,}."
    )
