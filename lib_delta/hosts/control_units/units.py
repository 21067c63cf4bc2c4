"""Units in a generation: which files and maps they mean, and what a picture says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_delta.diffusion.latent_spaces import LATENT_STRIDE
from lib_delta.errors import SettingError
from lib_delta.hosts.files.control_files import ControlFiles, encoders
from lib_delta.lru_cache import LRUCache
from lib_delta.request.control_unit import Unit
from lib_delta.request.passes import Passes
from lib_delta.request.request import Request

if TYPE_CHECKING:
    from torch import Tensor

    from lib_delta.controls.active_controls import ControlPick

# What a picture says besides the recipe: which files these were, and which maps.
UNIT_HASHES, MAP_HASHES = "Delta unit hashes", "Delta map hashes"
HASH_LENGTH = 10  # characters of a map's hash in the infotext
# Axes of the XYZ plot, by the field of the unit that each sets.
UNIT_AXES = {"unit_weight": "weight", "unit_start": "start", "unit_end": "end", "unit_model": "model"}
MAX_CACHED_MAPS = 8
PixelSize = tuple[int, int]  # in pixels, height first
Frame = tuple[PixelSize, PixelSize]  # of what the side model works at, and of the picture
SideSizeOf = Callable[[int, int], PixelSize]


class Units:
    """The units of a WebUI.  Maps stay for the next batches, which mostly ask for the same."""

    def __init__(self) -> None:
        self.files = ControlFiles()
        self._maps: LRUCache[tuple[Any, ...], Tensor] = LRUCache(max_count=MAX_CACHED_MAPS)

    def preprocessors(self) -> list[str]:
        """Return the names of what makes maps here."""
        from lib_delta.hosts.control_units import preprocessors

        return preprocessors.names()

    def preview(self, unit: Unit, number: int) -> Any:
        """Return the map of unit ``number``'s first picture, ``(H, W, 3)`` in bytes; raises :class:`DeltaError`."""
        from lib_delta.hosts.control_units.pictures import BLACK, WHITE, in_bytes, pictures_of

        unit = _without_encoder(replace(unit, enabled=True))
        unit.check(number)
        picture = pictures_of(unit.pictures[:1], number, WHITE if unit.preprocessor else BLACK)[0]
        return in_bytes(self.map_of(unit, picture) if unit.preprocessor else picture)

    def clear(self) -> None:
        """Forget the maps."""
        self._maps.clear()

    def with_listed_names(self, request: Request) -> Request:
        """Return a request whose units' models are named as they are listed; raises :class:`SettingError`."""
        return replace(
            request, units=tuple(self._with_listed_name(i + 1, unit) for i, unit in enumerate(request.units))
        )

    def _with_listed_name(self, number: int, unit: Unit) -> Unit:
        if not (unit.has_effect and unit.model):
            return unit
        return replace(unit, model=self.files.name_of(self.files.file(unit.model, number)))

    def hashes(self, request: Request, hash_of: Callable[[str], str]) -> dict[str, str]:
        """Return what a picture says of the units' files; raises :class:`SettingError`."""
        units = [(i + 1, unit) for i, unit in enumerate(request.units) if unit.has_effect and unit.model]
        found = {unit.model: hash_of(str(self.files.file(unit.model, number))) for number, unit in units}
        return {UNIT_HASHES: ", ".join(f"{name}: {value}" for name, value in found.items())} if found else {}

    def picks(self, p: Any, asked: Passes, sized: SideSizeOf) -> tuple[list[ControlPick], dict[str, str]]:
        """Return what units ask of the side model, and what the picture says of their maps.

        ``sized`` tells the size, in pixels, that the side model works at for a picture's height and width.
        Raises :class:`SettingError` for a unit without its model or picture.
        """
        request = asked.first if asked.first.wanted else asked.hires
        frames = [(sized(*size), size) for size in _sizes(p, asked)]
        picks, hashes = [], []
        for number, unit in enumerate(request.units, 1):
            if unit.has_effect:
                pick, of_map = self._pick(p, number, unit, frames)
                picks.append(pick)
                hashes.append(f"{number}: {of_map}")
        return picks, {MAP_HASHES: ", ".join(hashes)} if hashes else {}

    def _pick(self, p: Any, number: int, unit: Unit, frames: Sequence[Frame]) -> tuple[ControlPick, str]:
        from lib_delta.controls.active_controls import ControlPick
        from lib_delta.controls.control_file import prompts_with_pictures
        from lib_delta.controls.picture_file import picture_digest
        from lib_delta.hosts.control_units.pictures import own_mask, same_size

        file = self._file(number, unit)
        if prompts_with_pictures(file):
            unit = _without_encoder(unit)
        pictures, resize = self._pictures(p, number, unit, file)
        larger: list[Tensor] = []
        if unit.preprocessor:
            pictures, *others = ([self.map_of(unit, picture, size) for picture in pictures] for size, _ in frames)
            # Those that are made for a hires pass, where it asks for others than the first.
            larger = [] if not others or picture_digest(others[0]) == picture_digest(pictures) else others[0]
        if not prompts_with_pictures(file):
            pictures, larger = same_size(pictures, resize, *frames[0][1]), same_size(larger, resize, *frames[-1][1])
        pick = ControlPick(
            file,
            pictures,
            unit.weight,
            unit.start,
            unit.end,
            unit.mode,  # type: ignore[arg-type]
            resize,
            unit.weight_type,  # type: ignore[arg-type]
            encoders(),
            own_mask(p),
            larger,
            frames,
        )
        return pick, picture_digest(pictures)[:HASH_LENGTH]

    def _file(self, number: int, unit: Unit) -> Path:
        if not unit.model:
            raise SettingError(
                f"unit {number} of Delta Sampling has no model: "
                "choose a ControlNet or IP-Adapter, or switch the unit off"
            )
        return self.files.file(unit.model, number)

    def _pictures(self, p: Any, number: int, unit: Unit, file: Path) -> tuple[list[Tensor], Any]:
        """Return what a unit looks at, before its preprocessor, and how that is brought to size."""
        from lib_delta.controls.control_file import prompts_with_pictures
        from lib_delta.hosts.control_units.pictures import BLACK, WHITE, cut_like_own, own_pictures, pictures_of

        of_things = bool(unit.preprocessor) or prompts_with_pictures(file)
        taken, resize = pictures_of(unit.pictures, number, WHITE if of_things else BLACK), unit.resize
        if taken:
            taken = cut_like_own(p, taken, resize)
        else:
            taken, resize = own_pictures(p)
            if taken:
                p.comment(
                    f"Delta Sampling: unit {number} ({file.stem}) has no picture of its own and looks at img2img's: "
                    "pictures' texts do not hold those of units."
                )
        if not taken:
            raise SettingError(
                f"unit {number} of Delta Sampling ({self.files.name_of(file)}) has no picture:"
                " put one in, or switch the unit off"
            )
        return taken, resize

    def map_of(self, unit: Unit, picture: Tensor, size: PixelSize | None = None) -> Tensor:
        """Return what a unit's preprocessor makes of a picture for a pass of a size, height first.

        Without a size a pixel-perfect map is as large as the picture.
        """
        from lib_delta.controls.picture_file import picture_digest, pixels
        from lib_delta.hosts.control_units import preprocessors
        from lib_delta.hosts.control_units.pictures import in_bytes

        resolution = int(unit.resolution)
        if unit.pixel_perfect:
            height, width = picture.shape[-2:]
            fill = unit.resize == "resize and fill"
            resolution = preprocessors.pixel_perfect(height, width, size or (height, width), fill)
        key = unit.preprocessor, resolution, unit.threshold_a, unit.threshold_b, picture_digest([picture])
        cached = self._maps.get(key)
        if cached is not None:
            return cached
        made = preprocessors.run(unit.preprocessor, in_bytes(picture), resolution, unit.threshold_a, unit.threshold_b)
        control_map = pixels(made)
        self._maps.put(key, control_map)
        return control_map


def _without_encoder(unit: Unit) -> Unit:
    """Return a unit that names no image encoder where a preprocessor may be: an IP-Adapter's is found by its shape."""
    from lib_delta.hosts.control_units.preprocessors import encodes

    return replace(unit, preprocessor="") if encodes(unit.preprocessor) else unit


def _sizes(p: Any, asked: Passes) -> list[PixelSize]:
    """Return the sizes of the passes that have a delta, that of hires fix last."""
    first, second = (asked.of(hires).wanted and asked.of(hires).in_pass(hires) for hires in (False, True))
    if not (second and getattr(p, "enable_hr", False)):
        return [(p.height, p.width)]
    # What is enlarged is then cut to what was asked for, where the proportions differ.
    down, across = (LATENT_STRIDE * getattr(p, name, 0) for name in ("truncate_y", "truncate_x"))
    hires = p.hr_upscale_to_y - down, p.hr_upscale_to_x - across
    return [(p.height, p.width), hires] if first else [hires]


def with_unit_axes(request: Request, axes: Mapping[str, Any]) -> Request:
    """Apply an XYZ cell's values to the first unit that is on; raises :class:`SettingError` where none is."""
    values = {field: axes[axis] for axis, field in UNIT_AXES.items() if axis in axes}
    if not values:
        return request
    on = next((i for i, unit in enumerate(request.units) if unit.enabled), None)
    if on is None:
        raise SettingError("the plot's axis is of a unit of Delta Sampling, and none is on: switch one on")
    changed = replace(request.units[on], **values)
    if not changed.model:  # the axis' None: the picture without the unit
        changed = replace(changed, enabled=False)
    return replace(request, units=(*request.units[:on], changed, *request.units[on + 1 :]))


def plotted(of_cell: Sequence[Unit], of_accordion: Sequence[Unit]) -> tuple[Unit, ...]:
    """Return the units of a plot of which one cell's are known, with the one that this cell does without."""
    return tuple(
        own if own.enabled and not unit.enabled else unit for unit, own in zip(of_cell, of_accordion, strict=True)
    )
