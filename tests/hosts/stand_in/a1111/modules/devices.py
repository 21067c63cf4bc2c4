"""Where the WebUI computes."""

import torch

device = torch.device("cpu")
dtype_unet = torch.float32
collected = []


def get_optimal_device():
    return device


def torch_gc():
    collected.append(True)
