"""A host without a model: it parses settings as the real ones do, and records the calls of its hooks."""

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
    """The part of a host's units that the accordion uses: files, preprocessors, and a preview."""

    def __init__(self):
        self.files, self.known = self, ["control_v11p_sd15_canny", "ip-adapter_sd15"]

    def names(self):
        """Return the names of the model files."""
        return list(self.known)

    def refresh(self):
        """Find one more file."""
        self.known.append(f"found-{len(self.known)}")

    def preprocessors(self):
        """Return the names of the preprocessors."""
        return ["canny", "depth_midas"]

    def preview(self, unit, number):
        """Return the negative of the picture; one preprocessor fails."""
        if unit.preprocessor == "depth_midas":
            raise DeltaError(f"the preprocessor depth_midas of unit {number} failed")
        return unit.image.convert("L").point(lambda value: 255 - value)


class StandInCatalog:
    """A catalog of a few files."""

    def __init__(self):
        self.known_checkpoints = ["v1-5-pruned-emaonly.safetensors", "inks/moxin-tuned.safetensors [0123abcdef]"]
        self.known_loras = ["moxin", "lineart"]

    def checkpoints(self):
        """Return the names of all checkpoints."""
        return list(self.known_checkpoints)

    def bases(self):
        """Return the names of checkpoints that can be a base: all but SDXL's."""
        return [name for name in self.known_checkpoints if "xl" not in name]

    def refresh_checkpoints(self):
        """Find one more checkpoint."""
        self.known_checkpoints.append(f"found-{len(self.known_checkpoints)}.safetensors")

    def loras(self):
        """Return the names of the LoRAs."""
        return list(self.known_loras)

    def card(self, name):
        """Return the card of a LoRA."""
        if name not in self.known_loras:
            return LoraCard(name, fault=f"there is no LoRA {name!r}")
        return LoraCard(name, 0.6, "thin lines", "photo") if name == "lineart" else LoraCard(name)

    def refresh_loras(self):
        """Find one more LoRA."""
        self.known_loras.append(f"found-{len(self.known_loras)}")


def described(unit):
    """Return the size, the mode and the highest value of each of a unit's pictures."""
    pictures = [Image.open(io.BytesIO(file)) if isinstance(file, bytes) else file for file in unit.pictures]
    return " ".join(f"{p.width}x{p.height} {p.mode} {highest(p)}" for p in pictures) or "nothing"


def highest(picture):
    """Return the highest value in any channel of a picture."""
    extrema = picture.getextrema()
    return extrema[1] if isinstance(extrema[1], int) else max(high for _, high in extrema)


class StandInHost:
    """The part of a host that the script and the accordion use."""

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
        """Record the call."""
        self.calls.append("start")

    def process(self, p, arguments):
        """Parse the settings, and apply those of an XYZ cell on top."""
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
        """Record the call."""
        self.calls.append("process_batch")

    def before_sampling(self, p):
        """Record the call."""
        self.calls.append("before_sampling")

    def postprocess(self, p, processed):
        """Store the status of the run."""
        self.calls.append("postprocess")
        self.runs += 1
        if p.delta_request.enabled:
            self.loaded = [p.delta_request.base or "the default base", *map(str, p.delta_request.picks())]

    def status(self):
        """Return a line for what is loaded and one for the last run."""
        models = f"loaded: {' + '.join(self.loaded)} on cpu, 1.6 GB" if self.loaded else "nothing is loaded"
        return f"{models}\nlast run: number {self.runs}, 0.1 s a step" if self.runs else models

    def unload(self):
        """Unload the models, and return a message."""
        self.loaded = []
        return "1.6 GB were given back"


def use_stand_in_host():
    """Install the stand-in in ``lib_delta.hosts``, and return it."""
    host = StandInHost()
    module = types.ModuleType("lib_delta.hosts")
    module.host = lambda: host
    # hosts.ui is imported from the real folder; it reaches the WebUI only through ``host`` and ``modules``.
    module.__path__ = [str(Path(__file__).resolve().parents[2] / "lib_delta" / "hosts")]
    sys.modules["lib_delta.hosts"] = module
    return host
