"""The WebUI's prompt code around an OpenCLIP encoder, which has a tokenizer and pads with 0."""

from types import SimpleNamespace

from modules import loaded_model, sd_hijack_clip


class FrozenOpenCLIPEmbedderWithCustomWords(sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords):
    """Cuts texts into chunks as CLIP-L's class does."""

    def __init__(self, wrapped, hijack):
        pooled = getattr(wrapped, "return_pooled", False)
        super().__init__(SimpleNamespace(tokenizer=loaded_model.tokenizer, return_pooled=pooled), hijack)
        self.id_pad = 0
