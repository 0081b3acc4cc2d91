"""Know how many tokens a model has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Vocabulary:
    """The number of tokens of a model, as input and as output; its tokenizer may have more."""

    size: int
    num_samplable: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Vocabulary:
        """Return the vocabulary of a model by the shapes of its embeddings."""
        size = num_tokens(model)
        return cls(size, int(getattr(model.get_output_embeddings(), "out_features", size)))


def num_tokens(model: Any) -> int:
    """Return how many tokens a model takes, of which each rank may have some in its embedding."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0])
