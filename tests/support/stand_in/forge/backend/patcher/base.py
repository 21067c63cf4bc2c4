"""A model and its patches."""

from copy import deepcopy


class ModelPatcher:
    """A model that the memory manager moves."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.model_options = {"transformer_options": {}}

    def move_to(self, device):
        """Move a model; the main one's networks stay."""
        if not hasattr(self.model, "networks"):
            self.model.to(device)

    def is_clone(self, other):
        return getattr(other, "model", None) is self.model

    def clone(self):
        copied = type(self)(self.model, self.load_device, self.offload_device)
        copied.model_options = deepcopy(self.model_options)
        return copied

    def set_model_sampler_post_cfg_function(self, function):
        known = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*known, function]
