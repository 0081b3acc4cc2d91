"""Know how many tokens a model has."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Vocabulary:
    """The number of tokens of a model, as input and as output; its tokenizer may have more."""

    size: int
    num_samplable: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Vocabulary:
        """Return the vocabulary of a model by the shapes of its embeddings."""
        size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
        return cls(size, int(getattr(model.get_output_embeddings(), "out_features", size)))
