"""AUTOMATIC1111's main checkpoint."""

from types import SimpleNamespace

from modules import network, sd_hijack, sd_hijack_clip, shared
from modules.prompt_code import EmbeddingsWithFixes
from torch import nn

tokenizer = None


class CondStage(sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords):
    """The main checkpoint's text encoder."""

    def __init__(self, networks):
        super().__init__(SimpleNamespace(tokenizer=tokenizer), sd_hijack.model_hijack)
        self.networks = networks
        frame = networks.tower.transformer.text_model.embeddings
        frame.token_embedding = EmbeddingsWithFixes(frame.token_embedding, self.hijack)

    def encode_with_transformers(self, tokens):
        return self.networks.tower(tokens, shared.opts.CLIP_stop_at_last_layers)[0]


class DiffusionWrapper(nn.Module):
    """The wrapper of the main checkpoint's UNet."""

    conditioning_key = "crossattn"

    def __init__(self, unet):
        super().__init__()
        self.diffusion_model = unet


class LoadedModel:
    """The main checkpoint."""

    cond_stage_key, parameterization = "txt", "eps"
    is_sd1, is_sd2, is_sdxl, is_sd3 = True, False, False, False
    latent_channels = 4

    def __init__(self, info):
        self.sd_checkpoint_info = info
        self.networks = network.Networks(info.filename)
        self.model = DiffusionWrapper(self.networks.unet)
        self.alphas_cumprod = network.alphas_cumprod()
        self.cond_stage_model = CondStage(self.networks)
        # Encoded when the checkpoint is loaded, without any LoRA.
        self.cond_stage_model_empty_prompt = self.cond_stage_model([""])

    def get_learned_conditioning(self, texts):
        sd_hijack.model_hijack.embedding_db.load_textual_inversion_embeddings()
        return self.cond_stage_model(texts)

    def apply_model(self, x, t, cond):
        (context,) = cond["c_crossattn"]
        return self.networks(x, t, context)

    def noised(self, x, noise, sigma):
        """Return a latent with noise of a level, in the model's scale."""
        return x + noise * sigma


load_model = LoadedModel
