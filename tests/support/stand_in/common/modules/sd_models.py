"""Checkpoints: the list, and the one that is loaded."""

from pathlib import Path

from modules import shared
from modules.loaded_model import load_model

checkpoints_list = {}
folder = None


class CheckpointInfo:
    """A checkpoint file."""

    def __init__(self, path):
        self.filename, self.name, self.name_for_extra = str(path), path.name, path.stem
        self.shorthash, self.title = None, self.name

    def calculate_shorthash(self):
        """Compute the hash, which is part of the title from then on."""
        if self.shorthash is None:
            before, self.shorthash = self.title, f"{sum(Path(self.filename).name.encode()):010x}"
            self.title = f"{self.name} [{self.shorthash}]"
            entries = [(self.title if key == before else key, info) for key, info in checkpoints_list.items()]
            checkpoints_list.clear()
            checkpoints_list.update(entries)
        return self.shorthash


def list_models():
    checkpoints_list.clear()
    for path in sorted(Path(folder).glob("*.safetensors")):
        info = CheckpointInfo(path)
        checkpoints_list[info.title] = info


def get_closet_checkpoint_match(text):
    infos = list(checkpoints_list.values())
    exact = [i for i in infos if text in (i.title, i.name, i.name_for_extra, i.shorthash, i.filename)]
    return next(iter(exact), None)


def reload_model_weights(info):
    """Load a checkpoint as the main one, unless it is that already."""
    if shared.sd_model is None or shared.sd_model.sd_checkpoint_info is not info:
        info.calculate_shorthash()
        shared.sd_model = load_model(info)


def model_hash(filename):
    """Return the short hash of a file."""
    return f"{len(Path(filename).name):08x}"
