"""The models on the device, by Forge Neo's rules: as much of each as fits, the first one first."""

import torch

device = torch.device("cpu")
# The device's memory, and the part reserved for computing.
free = 2**40
inference = 2**30
current_loaded_models = []
caches_emptied = []
# Patchers are collected in a set, so their order is arbitrary.
in_order = list


class LoadedModel:
    """A patcher's model, at least partly on the device."""

    def __init__(self, model):
        self.model, self.loaded = model, True

    def model_load(self, room):
        self.model.partially_load(self.model.load_device, room)

    def model_unload(self, memory_to_free=None):
        """Unload as little as needed, or everything; return whether nothing is left."""
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
    """Unload models until so much is free: first those with most missing already, then the smallest."""
    known = {id(entry): entry for entry in current_loaded_models if entry.model.load_device == device}
    missing = {key: entry.model.model_size() - entry.model.loaded_size() for key, entry in known.items()}
    for key in sorted(known, key=lambda key: (-missing[key], known[key].model.model_size())):
        lacking = required - get_free_memory(device)
        if lacking < 0:
            break
        if known[key].model_unload(lacking):
            current_loaded_models.remove(known[key])


def load_models_gpu(patchers, memory_required=0, minimum_memory_required=0):
    """Load patchers' models, each into the memory that the earlier ones leave."""
    patchers = in_order(patchers)
    least = max(inference, minimum_memory_required)
    current_loaded_models[:] = [
        entry for entry in current_loaded_models if not any(patcher.is_clone(entry.model) for patcher in patchers)
    ]
    # Their loaded parts count, although they are not in the list.
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
