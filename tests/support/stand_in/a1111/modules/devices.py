"""The WebUI's devices."""

import torch

cpu = torch.device("cpu")
device = torch.device("cpu")
dtype_unet = torch.float32
dtype_vae = torch.float32
collected = []


def torch_gc():
    collected.append(True)
