"""Textual inversions from adapters' files, which the side model's prompts may name while the adapter is attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Of one text encoder, or of several by their names in WebUIs ("clip_l", "clip_g").
Vectors = Tensor | Mapping[str, Tensor]
Tokenize = Callable[[list[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class BundledEmbedding:
    """An embedding in the form that WebUIs use.

    ``vec`` is ``(vectors, width)``; for SDXL a dictionary with one for each text encoder.
    """

    name: str
    vec: Vectors
    # WebUIs write the hashes of a user's files to the infotext; an adapter's embedding has none.
    shorthash: str = ""

    @property
    def vectors(self) -> int:
        """The number of tokens that it replaces."""
        return max(map(len, self._parts))

    @property
    def shape(self) -> int:
        """The width of its vectors, of all text encoders together."""
        return sum(part.shape[-1] for part in self._parts)

    @property
    def _parts(self) -> Sequence[Tensor]:
        return (self.vec,) if isinstance(self.vec, Tensor) else tuple(self.vec.values())


class BundledEmbeddings:
    """Adds adapters' embeddings to a WebUI's database of embeddings; the user's files take precedence."""

    def __init__(self, database: Any, tokenize: Tokenize) -> None:
        """Patch a database that only Delta Sampling uses; ``tokenize`` is the prompts' tokenizer."""
        self._tokenize = tokenize
        self._embeddings: list[tuple[list[int], BundledEmbedding]] = []
        find_user_embedding = database.find_embedding_at_position

        def find(tokens: Sequence[int], position: int) -> tuple[Any, int | None]:
            embedding, length = find_user_embedding(tokens, position)
            return (embedding, length) if embedding is not None else self._at(tokens, position)

        database.find_embedding_at_position = find

    def replace(self, embeddings: Mapping[str, Vectors]) -> None:
        """Replace the embeddings; longer names take precedence over names that they start with."""
        ids = self._tokenize(list(embeddings)) if embeddings else []
        named = [
            (list(tokens), BundledEmbedding(name, vec))
            for tokens, (name, vec) in zip(ids, embeddings.items())
            if tokens
        ]
        self._embeddings = sorted(named, key=lambda entry: len(entry[0]), reverse=True)

    def _at(self, tokens: Sequence[int], position: int) -> tuple[BundledEmbedding | None, int | None]:
        for ids, embedding in self._embeddings:
            if list(tokens[position : position + len(ids)]) == ids:
                return embedding, len(ids)
        return None, None
