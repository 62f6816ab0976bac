"""The tasks that ship with fxfuse, as lm_eval wants them told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, TypeAlias

from fxfuse.measure.tasks import documents
from fxfuse.measure.tasks.documents import CHOICES, Document

if TYPE_CHECKING:
    from datasets import Dataset

Config: TypeAlias = dict[str, object]


@dataclass(frozen=True)
class Shipped:
    """A task of this package.

    Attributes:
        make: draws its documents.
        kind: how a document is put to the model and judged; see `_KINDS`.
        chance: the score of guessing.
    """

    make: Callable[[Random], list[Document]]
    kind: str
    chance: float = 0.0


SHIPPED: Mapping[str, Shipped] = {
    "cloze": Shipped(documents.cloze, "choice", 1 / CHOICES),
    "copying": Shipped(documents.copying, "likeliest"),
    "arithmetic": Shipped(documents.arithmetic, "likeliest"),
    "retrieval": Shipped(documents.retrieval, "choice", 1 / CHOICES),
    "rewriting": Shipped(documents.rewriting, "written"),
}

_KINDS: Mapping[str, Config] = {
    # The choice that the model finds likeliest must be the right one.
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    # Each token of the answer must be the likeliest after those before it.
    "likeliest": {
        "output_type": "loglikelihood",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    # The model writes a line, token by token with its KV cache, and that must be the answer.
    "written": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "filter_list": [
            {"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match"}],
    },
}


def config(name: str) -> Config:
    """The configuration of the shipped task ``name``. It makes its documents itself: nothing is fetched or cached."""
    shipped = SHIPPED[name]

    def dataset(**_: object) -> dict[str, Dataset]:
        from datasets import Dataset

        return {"test": Dataset.from_list([dict(document) for document in shipped.make(Random(name))])}

    common: Config = {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",
        "num_fewshot": 0,
    }
    return common | _KINDS[shipped.kind]
