"""The WebUI's prompt code around a text encoder."""

from modules import prompt_code, shared

last_extra_generation_params = {}


class ClassicTextProcessingEngine(prompt_code.ForgeEngine):
    """Reads the option for emphasis at every call, and ignores its argument; its notes are for the next picture."""

    def __init__(
        self,
        text_encoder,
        tokenizer,
        embedding_dir=None,
        embedding_key="clip_l",
        embedding_expected_shape=768,
        emphasis_name="Original",
        return_pooled=False,
    ):
        super().__init__(text_encoder, tokenizer, embedding_dir, embedding_expected_shape, return_pooled)

    def __call__(self, texts):
        return self.encode_and_note(texts, shared.opts.emphasis, last_extra_generation_params)
