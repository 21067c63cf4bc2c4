"""The main checkpoint's networks, independent of the extension's side models."""

import torch


class Networks:
    """A UNet and a text encoder; ``evaluations`` counts the UNet's forward passes."""

    def __init__(self, path):
        # Late: the extension must not find its models imported already.
        from pathlib import Path

        from lib_delta.files.weight_file import WeightFile
        from lib_delta.models.loading import load_unet
        from lib_delta.models.text import load_towers

        with WeightFile.open(Path(path)) as file:
            self.unet, report = load_unet(file, torch.float32)
            self.tower = load_towers(file, report.family, torch.float32)[0]
        self.evaluations = 0

    def apply_circular(self, enable):
        """Make the UNet's convolutions pad with the opposite edge, and set ``padding_mode`` as torch's do."""
        from lib_delta.models.forked_layers import Conv2d, set_tiling

        set_tiling(self.unet, enable)
        for layer in self.unet.modules():
            if isinstance(layer, Conv2d):
                layer.padding_mode = "circular" if enable else "zeros"

    def __call__(self, x, t, context):
        self.evaluations += 1
        return self.unet(x[None], t, context[None])[0]


def alphas_cumprod():
    """Return the signal levels of Stable Diffusion's 1000 timesteps."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()
