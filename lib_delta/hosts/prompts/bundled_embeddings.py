"""Textual inversions that came with an adapter: prompts of the side model may name them while it is attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Tokenize = Callable[[list[str]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class BundledEmbedding:
    """An embedding in the form of the WebUIs' own: ``vec`` is ``(vectors, width)``."""

    name: str
    vec: Tensor
    # WebUIs note the hashes of a user's files; this one has none.
    shorthash: str = ""

    @property
    def vectors(self) -> int:
        """How many tokens it takes."""
        return len(self.vec)

    @property
    def shape(self) -> int:
        """Its width."""
        return self.vec.shape[-1]


class BundledEmbeddings:
    """What a WebUI's database of embeddings finds besides the user's own files, which go first."""

    def __init__(self, database: Any, tokenize: Tokenize) -> None:
        """Take a database that is ours alone, and the tokeniser that prompts are read with."""
        self._tokenize = tokenize
        self._found: list[tuple[list[int], BundledEmbedding]] = []
        own = database.find_embedding_at_position

        def find(tokens: Sequence[int], position: int) -> tuple[Any, int | None]:
            embedding, length = own(tokens, position)
            return (embedding, length) if embedding is not None else self._at(tokens, position)

        database.find_embedding_at_position = find

    def replace(self, embeddings: Mapping[str, Tensor]) -> None:
        """Have these be found, and no others; longer names go before those that they begin with."""
        ids = self._tokenize(list(embeddings)) if embeddings else []
        named = [
            (list(tokens), BundledEmbedding(name, vec))
            for tokens, (name, vec) in zip(ids, embeddings.items())
            if tokens
        ]
        self._found = sorted(named, key=lambda entry: len(entry[0]), reverse=True)

    def _at(self, tokens: Sequence[int], position: int) -> tuple[BundledEmbedding | None, int | None]:
        for ids, embedding in self._found:
            if list(tokens[position : position + len(ids)]) == ids:
                return embedding, len(ids)
        return None, None
