"""A byte-pair tokenizer in CLIP's file format, with a vocabulary made from the emoji names."""

from __future__ import annotations

import json
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(prompts: list[str], folder: Path, merges: int = 300) -> None:
    """Write ``vocab.json`` and ``merges.txt`` to ``folder``, for ``transformers.CLIPTokenizer``.

    The layout is CLIP's: the bytes, the bytes that end a word, the merges, then the start and end tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    alphabet = list(bytes_to_unicode().values())
    units = alphabet + [unit + "</w>" for unit in alphabet]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=merges + 128, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(prompts, trainer)
    learned = [
        tuple(pair) if isinstance(pair, list) else tuple(pair.split(" "))
        for pair in json.loads(learner.to_str())["model"]["merges"]
    ]
    vocabulary = [*units, *("".join(pair) for pair in learned), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({unit: i for i, unit in enumerate(vocabulary)}, ensure_ascii=False), "utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in learned), "utf-8")
