"""Forge's main checkpoint."""

import torch
from backend.args import dynamic_args
from backend.patcher.unet import UnetPatcher
from backend.text_processing.classic_engine import ClassicTextProcessingEngine
from modules import network, shared

tokenizer = None


class Predictor:
    """The noise schedule."""

    def __init__(self):
        alphas = network.alphas_cumprod().double()
        self.sigmas = ((1 - alphas) / alphas).sqrt().float()

    def set_sigmas(self, sigmas):
        self.sigmas = sigmas.float()

    def timestep(self, sigma):
        """Return the whole timesteps nearest to the logarithm of noise levels."""
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0).float()


class KModel(torch.nn.Module):
    """UNet and schedule: from ``x0 + sigma * noise`` to x0."""

    def __init__(self, networks):
        super().__init__()
        self.networks, self.predictor = networks, Predictor()
        self.diffusion_model = networks.unet

    def apply_model(self, x, sigma, c_crossattn):
        s = sigma[:, None, None, None]
        return x - s * self.networks(x / (1 + s**2).sqrt(), self.predictor.timestep(sigma), c_crossattn)

    def memory_required(self, input_shape):
        return 0


class ForgeObjects:
    """The parts of a checkpoint."""

    def __init__(self, unet):
        self.unet = unet

    def shallow_copy(self):
        return ForgeObjects(self.unet)


class LoadedModel:
    """The main checkpoint; a timestep sampler's first run sets ``alphas_cumprod``."""

    is_sd1, is_sd2, is_sdxl, is_sd3 = True, False, False, False
    latent_channels = 4

    def __init__(self, info):
        self.sd_checkpoint_info = info
        self.networks = network.Networks(info.filename)
        self.forge_objects = ForgeObjects(UnetPatcher(KModel(self.networks), torch.device("cpu"), torch.device("cpu")))
        self.forge_objects_original = self.forge_objects.shallow_copy()
        self.text = ClassicTextProcessingEngine(
            self.networks.tower,
            tokenizer,
            dynamic_args["embedding_dir"],
            embedding_expected_shape=self.networks.tower.config.width,
        )

    def get_learned_conditioning(self, texts):
        self.text.clip_skip = shared.opts.CLIP_stop_at_last_layers
        return self.text(texts)

    def noised(self, x, noise, sigma):
        """Return a latent with noise of a level, in the model's scale."""
        return x + noise * sigma


load_model = LoadedModel
