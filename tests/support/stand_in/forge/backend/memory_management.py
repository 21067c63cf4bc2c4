"""The models on the device, each as a whole."""

import torch

device = torch.device("cpu")
free = 2**40
current_loaded_models = []
caches_emptied = []


class LoadedModel:
    """A patcher's model on the device."""

    def __init__(self, model):
        self.model, self.loaded = model, True
        model.move_to(model.load_device)

    def model_unload(self):
        self.loaded = False
        self.model.move_to(self.model.offload_device)


def get_torch_device():
    return device


def text_encoder_device():
    return torch.device("cpu")


def unet_offload_device():
    return torch.device("cpu")


def should_use_fp16(device):
    return False


def get_free_memory(device):
    return free


def minimum_inference_memory():
    return 2**30


def unload_all_models():
    for entry in current_loaded_models:
        entry.model_unload()
    current_loaded_models.clear()


def soft_empty_cache():
    caches_emptied.append(True)


def load_models_gpu(patchers, memory_required=0, minimum_memory_required=0):
    """Load patchers' models that are not loaded yet."""
    for patcher in patchers:
        if not any(patcher is entry.model for entry in current_loaded_models):
            current_loaded_models[:] = [entry for entry in current_loaded_models if not patcher.is_clone(entry.model)]
            current_loaded_models.append(LoadedModel(patcher))
