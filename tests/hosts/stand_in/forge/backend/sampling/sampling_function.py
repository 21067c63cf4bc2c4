"""Before a pass."""

from backend.memory_management import load_models_gpu


def sampling_prepare(unet, x):
    """Have the model and what extensions have added to it on the device."""
    load_models_gpu([unet, *unet.extra_model_patchers_during_sampling])
