"""The WebUI's prompt code around a text encoder."""

import torch
from modules import sd_hijack
from modules.prompt_code import encode


class FrozenCLIPEmbedderWithCustomWords(torch.nn.Module):
    """Cuts texts into chunks, which subclasses encode."""

    def __init__(self, wrapped, hijack):
        super().__init__()
        self.hijack = sd_hijack.model_hijack
        self.hijack, self.tokenizer = hijack, wrapped.tokenizer
        self.return_pooled, self.id_pad = getattr(wrapped, "return_pooled", False), None

    def tokenize(self, texts):
        return self.tokenizer(texts, truncation=False, add_special_tokens=False)["input_ids"]

    def forward(self, texts):
        return encode(self, self.tokenizer, texts, self.hijack.embedding_db, self.hijack, self.id_pad)

    def encode_with_transformers(self, tokens):
        raise NotImplementedError
