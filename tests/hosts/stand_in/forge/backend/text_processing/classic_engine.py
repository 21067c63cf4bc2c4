"""The WebUI's prompt code around a text encoder."""

from modules.prompt_code import EmbeddingFiles, EmbeddingsWithFixes, encode


class ClassicTextProcessingEngine:
    """Cuts texts into chunks and encodes them; replaces the token embedding of the encoder that it is given."""

    def __init__(
        self,
        text_encoder,
        tokenizer,
        embedding_dir=None,
        embedding_key="clip_l",
        embedding_expected_shape=768,
        emphasis_name="Original",
    ):
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

    def __call__(self, texts):
        return encode(self, self.tokenizer, texts, self.embeddings, self.embeddings)

    def encode_with_transformers(self, tokens):
        return self.text_encoder(tokens, self.clip_skip)[0]
