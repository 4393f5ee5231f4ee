"""The document of ``smartkv demo``: Python's own language reference with a note hidden in it."""

from __future__ import annotations

import json
from typing import Any

from .errors import CliError

TOPICS = ("execmodel", "with", "class", "exceptions", "raise", "for", "while")  # in this order, then cut to NUM_TOKENS
NUM_TOKENS = 3000  # SmolLM2-135M finds the note with its full cache here, and no longer does at 6,000
NOTE_AT = 0.2  # of the document
NOTE = "Note: the meeting was moved to Thursday."
QUESTION = "To which day was the meeting moved?"


def language_reference(tokenizer: Any, num_tokens: int = NUM_TOKENS) -> str:
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


def run_demo(session: Any, json_line: bool) -> None:
    """Say what is shown, show it, say what came out."""
    session.load()
    document = plant(language_reference(session.tokenizer), NOTE)
    share = session.settings.budget
    session.out.print(
        f"The document is a part of Python's language reference, about {NUM_TOKENS:,} tokens long. One fifth into it "
        f"stands a note:\n\n  {NOTE}\n\n"
        f"The model reads it once, and its key-value cache is compressed (budget {share}, policy "
        f"{session.settings.policy}) before the question is known:\n\n  {QUESTION}\n\n"
        "Then the same with the full cache.\n",
        markup=False,
    )
    result = session.answer(document, QUESTION, compare=True, json_line=False)
    report, full = result["smartkv"]["after_answer"], result["full"]["after_answer"]
    same = "The two answers agree." if result["same_answer"] else "The two answers do not agree."
    session.out.print(
        f"{same} The compressed cache holds {report['total_bytes']:,} bytes, {100 * report['ratio']:.1f} % of the "
        f"{full['full_bytes']:,} bytes of a full bf16 cache of as many tokens.",
        markup=False,
    )
    if json_line:
        print(json.dumps(result), flush=True)
