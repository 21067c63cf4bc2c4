"""Which models are on the device, by Forge Neo's rules: of each as much as fits, the first as much as it can get."""

import torch

device = torch.device("cpu")
# The device's memory, and what is kept for whatever computes there.
free = 2**40
inference = 2**30
current_loaded_models = []
caches_emptied = []
# Patchers are collected in a set: they come in any order.
in_order = list


class LoadedModel:
    """A patcher's model, of which a part at least is on the device."""

    def __init__(self, model):
        self.model, self.loaded = model, True

    def model_load(self, room):
        self.model.partially_load(self.model.load_device, room)

    def model_unload(self, memory_to_free=None):
        """Unload as little as will do, or all; True if nothing is left."""
        if memory_to_free is not None and memory_to_free < self.model.loaded_size():
            freed = self.model.partially_unload(self.model.offload_device, memory_to_free)
            if freed >= memory_to_free:
                return False
        self.loaded = False
        self.model.detach()
        return True


def get_torch_device():
    return device


def text_encoder_device():
    return torch.device("cpu")


def unet_offload_device():
    return torch.device("cpu")


def should_use_fp16(device):
    return False


def get_free_memory(device):
    return free - sum(entry.model.loaded_size() for entry in current_loaded_models)


def minimum_inference_memory():
    return inference


def unload_all_models():
    for entry in current_loaded_models:
        entry.model_unload()
    current_loaded_models.clear()


def soft_empty_cache():
    caches_emptied.append(True)


def free_memory(required, device):
    """Unload models until so much is free, those first of which most is missing already; of those the smallest."""
    known = {id(entry): entry for entry in current_loaded_models if entry.model.load_device == device}
    missing = {key: entry.model.model_size() - entry.model.loaded_size() for key, entry in known.items()}
    for key in sorted(known, key=lambda key: (-missing[key], known[key].model.model_size())):
        lacking = required - get_free_memory(device)
        if lacking < 0:
            break
        if known[key].model_unload(lacking):
            current_loaded_models.remove(known[key])


def load_models_gpu(patchers, memory_required=0, minimum_memory_required=0):
    """Load patchers' models, each in the memory that those before it have left."""
    patchers = in_order(patchers)
    least = max(inference, minimum_memory_required)
    current_loaded_models[:] = [
        entry for entry in current_loaded_models if not any(patcher.is_clone(entry.model) for patcher in patchers)
    ]
    # What is loaded of them counts, though they are not in the list.
    there = sum(patcher.loaded_size() for patcher in patchers)
    lacking = sum(patcher.model_size() for patcher in patchers) - there
    free_memory(lacking * 1.1 + there + max(inference, memory_required), device)
    for i, patcher in enumerate(patchers):
        loaded = patcher.loaded_size()
        elsewhere = sum(other.loaded_size() for other in patchers[i:])
        room = max(0, get_free_memory(device) - elsewhere + loaded - least) - loaded
        entry = LoadedModel(patcher)
        entry.model_load(room or 0.1)
        current_loaded_models.insert(0, entry)
