"""A model and its patches; Forge Neo loads as much of it as fits."""

from copy import deepcopy


class Part:
    """A layer with weights; only the WebUI's layers are cast by hand if they stay on the CPU.

    The main model's weights do not move; only their sizes count.
    """

    def __init__(self, module, own):
        self.module, self.own = module, own
        weights = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        self.size = sum(weight.nbytes for weight in weights)

    there = property(lambda self: getattr(self.module, "forge_patched_weights", False))

    def move(self, device, there):
        self.module.forge_patched_weights = there
        if not self.own:
            self.module.to(device)


class ModelPatcher:
    """A model that the memory manager moves layer by layer."""

    def __init__(self, model, load_device, offload_device, size=0, *, current_device=None):
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        self.model_options = {"transformer_options": {}}
        if not hasattr(model, "model_loaded_weight_memory"):
            model.model_loaded_weight_memory, model.model_lowvram = 0, False

    def _parts(self):
        own = hasattr(self.model, "networks")
        network = self.model.networks.unet if own else self.model
        parts = [Part(module, own) for module in network.modules()]
        return sorted((part for part in parts if part.size), key=lambda part: part.size)

    def model_size(self):
        if not self.size:
            self.size = sum(part.size for part in self._parts())
        return self.size

    def loaded_size(self):
        return self.model.model_loaded_weight_memory

    def is_clone(self, other):
        return getattr(other, "model", None) is self.model

    def clone(self):
        copied = type(self)(self.model, self.load_device, self.offload_device, self.model_size())
        copied.model_options = deepcopy(self.model_options)
        return copied

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        """Load the largest layers first; skip those that do not fit, even if they cannot be cast by hand."""
        count, cast = 0, False
        for part in reversed(self._parts()):
            if full_load or count + part.size < lowvram_model_memory:
                count += part.size
                part.move(device_to, True)
            else:
                cast = cast or part.own
        self.model.model_lowvram, self.model.model_loaded_weight_memory = cast, count

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if extra_memory < 0:
            self.partially_unload(self.offload_device, -extra_memory)
            return 0
        before = self.loaded_size()
        if before and not self.model.model_lowvram:
            return 0  # regarded as complete
        full = before + extra_memory > self.model_size()
        self.load(device_to, lowvram_model_memory=before + extra_memory, full_load=full)
        return self.loaded_size() - before

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        freed = 0
        for part in self._parts():
            if freed > memory_to_free:
                break
            if part.there:
                part.move(device_to, False)
                freed += part.size
        self.model.model_lowvram = True
        self.model.model_loaded_weight_memory -= freed
        return freed

    def detach(self, unpatch_all=True):
        if not unpatch_all:
            return
        for part in self._parts():
            part.move(self.offload_device, False)
        self.model.model_lowvram, self.model.model_loaded_weight_memory = False, 0

    def set_model_sampler_post_cfg_function(self, function):
        known = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*known, function]
