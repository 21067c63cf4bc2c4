"""The common part of the WebUIs' text engines: chunks of 75 tokens, and words for learned vectors."""

from collections import namedtuple
from pathlib import Path

import torch
from safetensors.torch import load_file

CHUNK = 75
Fix = namedtuple("Fix", ["offset", "embedding"])


class Embedding:
    """A textual inversion: ``vec`` ``(vectors, width)``."""

    def __init__(self, name, vec):
        self.name, self.vec, self.vectors, self.shape = name, vec, len(vec), vec.shape[-1]


class EmbeddingFiles:
    """The textual inversions of some folders that have the expected width."""

    def __init__(self, expected_shape=-1):
        self.embedding_dirs = {}
        self.ids_lookup = {}
        self.expected_shape = expected_shape
        self.fixes = None

    def add_embedding_dir(self, path):
        self.embedding_dirs[path] = Path(path)

    def read(self, register):
        """Register the embeddings of all folders."""
        self.ids_lookup.clear()
        for path in [path for folder in self.embedding_dirs.values() for path in sorted(folder.glob("*.safetensors"))]:
            embedding = Embedding(path.stem, load_file(path)["emb_params"])
            if embedding.shape == self.expected_shape:
                register(embedding)

    def register_ids(self, ids, embedding):
        self.ids_lookup.setdefault(ids[0], []).append((ids, embedding))

    def find_embedding_at_position(self, tokens, position):
        for ids, embedding in self.ids_lookup.get(tokens[position], []):
            if tokens[position : position + len(ids)] == ids:
                return embedding, len(ids)
        return None, None


def chunks_of(tokens, embeddings, start, end):
    """Return each chunk's 77 tokens and its fixes."""
    chunks, position = [([], [])], 0
    while position < len(tokens):
        embedding, length = embeddings.find_embedding_at_position(tokens, position)
        size = 1 if embedding is None else embedding.vectors
        if len(chunks[-1][0]) + size > CHUNK:
            chunks.append(([], []))
        words, fixes = chunks[-1]
        if embedding is not None:
            fixes.append(Fix(len(words), embedding))
        words += [tokens[position]] if embedding is None else [0] * size
        position += length or 1
    return [([start, *words, *[end] * (CHUNK + 1 - len(words))], fixes) for words, fixes in chunks]


def encode(engine, tokenizer, texts, embeddings, found, pad=None):
    """Encode texts to ``(N, 77 * chunks, C)`` with the engine's encoder, which reads ``found.fixes``.

    The encoder's pooled text is that of the first chunk, and ``pad`` replaces the end tokens that fill a chunk.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = end if pad is None else pad
    rows = [chunks_of(tokens, embeddings, start, end) for tokens in engine.tokenize(list(texts))]
    encoded = []
    for i in range(max(map(len, rows))):
        parts = [row[i] if i < len(row) else ([start, *[end] * (CHUNK + 1)], []) for row in rows]
        found.fixes = [fixes for _, fixes in parts]
        tokens = torch.tensor([tokens for tokens, _ in parts])
        after = (tokens == end).cumsum(1) > 1
        encoded.append(engine.encode_with_transformers(tokens.masked_fill(after, pad)))
    joined = torch.cat(encoded, 1)
    return (joined, encoded[0].pooled) if engine.return_pooled else joined


class ForgeEngine:
    """Forge's text engine; replaces the token embedding of its encoder."""

    def __init__(self, text_encoder, tokenizer, embedding_dir, embedding_expected_shape, return_pooled=False):
        self.return_pooled, self.id_pad = return_pooled, tokenizer.pad_token_id
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.embeddings = EmbeddingFiles(embedding_expected_shape)
        if isinstance(embedding_dir, str):
            self.embeddings.add_embedding_dir(embedding_dir)
            self.embeddings.read(lambda e: self.embeddings.register_ids(self.tokenize([e.name])[0], e))
        frame = text_encoder.transformer.text_model.embeddings
        frame.token_embedding = EmbeddingsWithFixes(frame.token_embedding, self.embeddings)
        assert frame.token_embedding.wrapped.weight is not None
        self.clip_skip = 1

    def tokenize(self, texts):
        return self.tokenizer(texts, truncation=False, add_special_tokens=False)["input_ids"]

    def encode_and_note(self, texts, emphasis, notes):
        """Encode texts, and note their embeddings and emphasis for the infotext."""
        ends = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        chunks = [c for tokens in self.tokenize(list(texts)) for c in chunks_of(tokens, self.embeddings, *ends)]
        used = {fix.embedding.name for _, fixes in chunks for fix in fixes}
        if used:
            notes["TI"] = ", ".join(filter(None, (notes.get("TI"), *sorted(used))))
        if emphasis != "Original" and any("(" in text or "[" in text for text in texts):
            notes["Emphasis"] = emphasis
        return encode(self, self.tokenizer, texts, self.embeddings, self.embeddings, self.id_pad)

    def encode_with_transformers(self, tokens):
        return self.text_encoder(tokens, self.clip_skip)[0]


class EmbeddingsWithFixes(torch.nn.Module):
    """A token embedding that inserts learned vectors for their words."""

    def __init__(self, wrapped, found):
        super().__init__()
        self.wrapped, self.found = wrapped, found

    def forward(self, ids):
        fixes, self.found.fixes = self.found.fixes, None
        rows = []
        for row, row_fixes in zip(self.wrapped(ids), fixes or [[]] * len(ids)):
            for offset, embedding in row_fixes:
                row = torch.cat((row[: offset + 1], embedding.vec, row[offset + 1 + embedding.vectors :]))
            rows.append(row)
        return torch.stack(rows)
