"""Grade school mathematics (Cobbe et al. 2021): what is compressed is the model's own reasoning, as it decodes."""

from __future__ import annotations

import json
from collections.abc import Iterator

from smartkv_ext.eval.items import Document, Question

from .options import TaskOptions

INSTRUCTION = 'Solve the problem step by step. End with a line "#### " and the number alone.\n\n'


def gsm8k(options: TaskOptions) -> Iterator[Document]:
    """The first ``samples`` problems of gsm8k_test.jsonl, or of the training set where there is no other.

    The problem is the context, so a budget below its length works on the reasoning alone.
    """
    path = options.file("math/gsm8k_test.jsonl", "gsm8k_test.jsonl", "math/gsm8k_train.jsonl", "gsm8k_train.jsonl")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[: options.samples]):
        row = json.loads(line)
        question = Question(
            name=str(number), text="", answers=(row["answer"].split("#### ")[-1].replace(",", "").strip(),),
            metric="final_number", max_new_tokens=400,
        )  # fmt: skip
        name = f"{path.stem}/{number}"
        yield Document(task="gsm8k", name=name, context=INSTRUCTION + row["question"] + "\n", questions=(question,))
