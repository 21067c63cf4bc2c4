"""The main model's patcher."""

from backend.patcher.base import ModelPatcher


class UnetPatcher(ModelPatcher):
    """Also lists the models and the memory that sampling needs."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.extra_model_patchers_during_sampling = []
        self.extra_preserved_memory_during_sampling = 0

    def clone(self):
        copied = super().clone()
        copied.extra_model_patchers_during_sampling = list(self.extra_model_patchers_during_sampling)
        copied.extra_preserved_memory_during_sampling = self.extra_preserved_memory_during_sampling
        return copied

    def add_extra_model_patcher_during_sampling(self, patcher):
        self.extra_model_patchers_during_sampling.append(patcher)

    def add_extra_preserved_memory_during_sampling(self, count):
        self.extra_preserved_memory_during_sampling += count
