"""A host without a model: it reads settings as the real ones do, and remembers what was called."""

import io
import sys
import tempfile
import types
from dataclasses import replace
from pathlib import Path

from PIL import Image

from lib_delta.errors import DeltaError
from lib_delta.page.lora_rows import LoraCard
from lib_delta.request.lora_recipe import format_picks
from lib_delta.request.presets import Presets
from lib_delta.request.request import Request


class StandInUnits:
    """What the script sees of a WebUI's units: their files, their preprocessors, and a preview."""

    def __init__(self):
        self.files, self.known = self, ["control_v11p_sd15_canny", "ip-adapter_sd15"]

    def names(self):
        """Return the names of the models."""
        return list(self.known)

    def refresh(self):
        """Find one more."""
        self.known.append(f"found-{len(self.known)}")

    def preprocessors(self):
        """Return their names."""
        return ["canny", "depth_midas"]

    def preview(self, unit, number):
        """Turn the picture into its negative; one preprocessor fails."""
        if unit.preprocessor == "depth_midas":
            raise DeltaError(f"the preprocessor depth_midas of unit {number} failed")
        return unit.image.convert("L").point(lambda value: 255 - value)


class StandInCatalog:
    """The names of a few files."""

    def __init__(self):
        self.known_checkpoints = ["v1-5-pruned-emaonly.safetensors", "inks/moxin-tuned.safetensors [0123abcdef]"]
        self.known_loras = ["moxin", "lineart"]

    def checkpoints(self):
        """Return the names that dropdowns show."""
        return list(self.known_checkpoints)

    def bases(self):
        """Return those that can be a base: all but SDXL's."""
        return [name for name in self.known_checkpoints if "xl" not in name]

    def refresh_checkpoints(self):
        """Find one more."""
        self.known_checkpoints.append(f"found-{len(self.known_checkpoints)}.safetensors")

    def loras(self):
        """Return the names that the dropdown shows."""
        return list(self.known_loras)

    def card(self, name):
        """Return what the user has noted for one of them."""
        if name not in self.known_loras:
            return LoraCard(name, fault=f"there is no LoRA {name!r}")
        return LoraCard(name, 0.6, "thin lines", "photo") if name == "lineart" else LoraCard(name)

    def refresh_loras(self):
        """Find one more."""
        self.known_loras.append(f"found-{len(self.known_loras)}")


def described(unit):
    """Tell what pictures a unit was given: the size, the mode and the highest value of each."""
    pictures = [Image.open(io.BytesIO(given)) if isinstance(given, bytes) else given for given in unit.pictures]
    return " ".join(f"{each.width}x{each.height} {each.mode} {highest(each)}" for each in pictures) or "nothing"


def highest(picture):
    """Return the highest value of any of a picture's channels."""
    found = picture.getextrema()
    return found[1] if isinstance(found[1], int) else max(high for _, high in found)


class StandInHost:
    """What the script sees of a WebUI."""

    name = "stand-in"

    def __init__(self):
        self.calls, self.loaded, self.runs = [], [], 0
        self.folder = Path(tempfile.mkdtemp())
        self.catalog = StandInCatalog()
        self.units = StandInUnits()

    def presets(self):
        """Return the user's presets."""
        return Presets(self.folder / "presets.json")

    def start(self):
        """Take note."""
        self.calls.append("start")

    def process(self, p, arguments):
        """Read the settings and apply an XYZ cell's on top."""
        self.calls.append("process")
        p.delta_error = None
        try:
            request, axes = Request.from_arguments(arguments), dict(getattr(p, "delta_sampling_axes", {}))
            weight = axes.pop("lora_weight", None)
            request = replace(request, **axes)
            if weight is not None:
                picks = [replace(pick, weight=weight) for pick in request.picks()]
                request = replace(request, loras=format_picks(picks))
        except DeltaError as error:
            p.delta_error = error
            return
        p.delta_request = request
        p.extra_generation_params.update(request.infotext())
        seen = [f"{number}: {described(unit)}" for number, unit in enumerate(request.units, 1) if unit.enabled]
        if seen:
            p.extra_generation_params["Seen by units"] = "; ".join(seen)

    def process_batch(self, p):
        """Take note."""
        self.calls.append("process_batch")

    def before_sampling(self, p):
        """Take note."""
        self.calls.append("before_sampling")

    def postprocess(self, p, processed):
        """Remember what the status tells."""
        self.calls.append("postprocess")
        self.runs += 1
        if p.delta_request.enabled:
            self.loaded = [p.delta_request.base or "the default base", *map(str, p.delta_request.picks())]

    def status(self):
        """Return a line for what is loaded and one for the last run."""
        held = f"loaded: {' + '.join(self.loaded)} on cpu, 1.6 GB" if self.loaded else "nothing is loaded"
        return f"{held}\nlast run: number {self.runs}, 0.1 s a step" if self.runs else held

    def unload(self):
        """Forget what was loaded."""
        self.loaded = []
        return "1.6 GB were given back"


def use_stand_in_host():
    """Put it in the place of the real ones, and return it."""
    made = StandInHost()
    module = types.ModuleType("lib_delta.hosts")
    module.host = lambda: made
    # What makes widgets there knows no WebUI but through this one.
    module.__path__ = [str(Path(__file__).resolve().parents[2] / "lib_delta" / "hosts")]
    sys.modules["lib_delta.hosts"] = module
    return made
