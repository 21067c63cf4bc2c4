"""The WebUI's prompt code around a text encoder; reads the option for emphasis at every call."""

from modules import prompt_code, shared

from backend.args import dynamic_args


class ClassicTextProcessingEngine(prompt_code.ForgeEngine):
    """Like Forge's, with other arguments and another place for notes."""

    def __init__(
        self,
        text_encoder,
        tokenizer,
        embedding_dir=None,
        embedding_key="clip_l",
        embedding_expected_shape=768,
        return_pooled=False,
    ):
        super().__init__(text_encoder, tokenizer, embedding_dir, embedding_expected_shape, return_pooled)

    def __call__(self, texts):
        return self.encode_and_note(texts, shared.opts.emphasis, dynamic_args.last_extra_generation_params)
