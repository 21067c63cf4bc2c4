"""The units of a generation: their model files, maps and infotext."""

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

# Infotext labels, in addition to the recipe: hashes of the units' files, and of their maps.
UNIT_HASHES, MAP_HASHES = "Delta unit hashes", "Delta map hashes"
HASH_LENGTH = 10  # characters of a map's hash in the infotext
# The XYZ plot's axes for units, with the unit's field that each sets.
UNIT_AXES = {"unit_weight": "weight", "unit_start": "start", "unit_end": "end", "unit_model": "model"}
MAX_CACHED_MAPS = 8
PixelSize = tuple[int, int]  # height first
Frame = tuple[PixelSize, PixelSize]  # the side model's size in a pass, and the image's
SideSizeOf = Callable[[int, int], PixelSize]


class Units:
    """The units of a WebUI, with a cache of maps, because successive batches mostly use the same ones."""

    def __init__(self) -> None:
        self.files = ControlFiles()
        self._maps: LRUCache[tuple[Any, ...], Tensor] = LRUCache(max_count=MAX_CACHED_MAPS)

    def preprocessors(self) -> list[str]:
        """Return the names of the available preprocessors."""
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
        """Clear the cached maps."""
        self._maps.clear()

    def with_listed_names(self, request: Request) -> Request:
        """Return a request with each unit's model under its listed name; raises :class:`SettingError`."""
        return replace(
            request, units=tuple(self._with_listed_name(i + 1, unit) for i, unit in enumerate(request.units))
        )

    def _with_listed_name(self, number: int, unit: Unit) -> Unit:
        if not (unit.has_effect and unit.model):
            return unit
        return replace(unit, model=self.files.name_of(self.files.file(unit.model, number)))

    def hashes(self, request: Request, hash_of: Callable[[str], str]) -> dict[str, str]:
        """Return the infotext of the units' files; raises :class:`SettingError`."""
        units = [(i + 1, unit) for i, unit in enumerate(request.units) if unit.has_effect and unit.model]
        hashes = {unit.model: hash_of(str(self.files.file(unit.model, number))) for number, unit in units}
        return {UNIT_HASHES: ", ".join(f"{name}: {value}" for name, value in hashes.items())} if hashes else {}

    def picks(self, p: Any, requests: Passes, side_size: SideSizeOf) -> tuple[list[ControlPick], dict[str, str]]:
        """Return the units' controls for the side model, and the infotext of their maps.

        ``side_size`` returns the side model's size, in pixels, for an image's height and width.  Raises
        :class:`SettingError` for a unit without model or picture.
        """
        from lib_delta.controls.picture_file import picture_digest

        request = requests.first if requests.first.wanted else requests.hires
        frames = [(side_size(*size), size) for size in _sizes(p, requests)]
        active = [(number, unit) for number, unit in enumerate(request.units, 1) if unit.has_effect]
        picks = [self._pick(p, number, unit, frames) for number, unit in active]
        hashes = [
            f"{number}: {picture_digest(pick.pictures)[:HASH_LENGTH]}" for (number, _), pick in zip(active, picks)
        ]
        return picks, {MAP_HASHES: ", ".join(hashes)} if hashes else {}

    def _pick(self, p: Any, number: int, unit: Unit, frames: Sequence[Frame]) -> ControlPick:
        from lib_delta.controls.active_controls import ControlPick
        from lib_delta.controls.control_file import prompts_with_pictures
        from lib_delta.hosts.control_units.pictures import img2img_mask, same_size

        file = self._file(number, unit)
        prompts = prompts_with_pictures(file)
        if prompts:
            unit = _without_encoder(unit)
        pictures, resize = self._pictures(p, number, unit, file)
        pictures, larger = self._preprocessed(unit, pictures, frames)
        if not prompts:
            pictures, larger = same_size(pictures, resize, *frames[0][1]), same_size(larger, resize, *frames[-1][1])
        return ControlPick(
            file,
            pictures,
            unit.weight,
            start=unit.start,
            end=unit.end,
            mode=unit.mode,
            resize=resize,
            weight_type=unit.weight_type,
            encoders=encoders(),
            mask=img2img_mask(p),
            larger=larger,
            frames=frames,
        )

    def _preprocessed(
        self, unit: Unit, pictures: list[Tensor], frames: Sequence[Frame]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps of the first pass, and those of the hires pass if they differ."""
        from lib_delta.controls.picture_file import picture_digest

        if not unit.preprocessor:
            return pictures, []
        maps, *later = ([self.map_of(unit, picture, size) for picture in pictures] for size, _ in frames)
        same = not later or picture_digest(later[0]) == picture_digest(maps)
        return maps, [] if same else later[0]

    def _file(self, number: int, unit: Unit) -> Path:
        if not unit.model:
            raise SettingError(
                f"unit {number} of Delta Sampling has no model: "
                "choose a ControlNet or IP-Adapter, or switch the unit off"
            )
        return self.files.file(unit.model, number)

    def _pictures(self, p: Any, number: int, unit: Unit, file: Path) -> tuple[list[Tensor], Any]:
        """Return a unit's pictures before its preprocessor, or img2img's, and their resize mode."""
        from lib_delta.controls.control_file import prompts_with_pictures
        from lib_delta.hosts.control_units.pictures import BLACK, WHITE, cut_like_img2img, img2img_pictures, pictures_of

        ground = WHITE if unit.preprocessor or prompts_with_pictures(file) else BLACK
        pictures = pictures_of(unit.pictures, number, ground)
        if pictures:
            return cut_like_img2img(p, pictures, unit.resize), unit.resize
        pictures, resize = img2img_pictures(p)
        if not pictures:
            raise SettingError(
                f"unit {number} of Delta Sampling ({self.files.name_of(file)}) has no picture:"
                " put one in, or switch the unit off"
            )
        p.comment(
            f"Delta Sampling: unit {number} ({file.stem}) has no picture and uses img2img's, as infotexts do not"
            " contain the pictures of units."
        )
        return pictures, resize

    def map_of(self, unit: Unit, picture: Tensor, size: PixelSize | None = None) -> Tensor:
        """Return a preprocessor's map of a picture for a pass of ``size`` (height first).

        Without a size, a pixel-perfect map is as large as the picture.
        """
        from lib_delta.controls.picture_file import picture_digest, pixels
        from lib_delta.hosts.control_units import preprocessors
        from lib_delta.hosts.control_units.pictures import in_bytes

        resolution = int(unit.resolution)
        if unit.pixel_perfect:
            height, width = picture.shape[-2:]
            fill = unit.resize == "resize and fill"
            resolution = preprocessors.pixel_perfect(height, width, size or (height, width), fill=fill)
        key = unit.preprocessor, resolution, unit.threshold_a, unit.threshold_b, picture_digest([picture])
        cached = self._maps.get(key)
        if cached is not None:
            return cached
        control_map = pixels(
            preprocessors.run(
                unit.preprocessor,
                in_bytes(picture),
                resolution=resolution,
                a=unit.threshold_a,
                b=unit.threshold_b,
            )
        )
        self._maps.put(key, control_map)
        return control_map


def _without_encoder(unit: Unit) -> Unit:
    """Return the unit without a preprocessor that names an image encoder; shapes select an IP-Adapter's encoder."""
    from lib_delta.hosts.control_units.preprocessors import encodes

    return replace(unit, preprocessor="") if encodes(unit.preprocessor) else unit


def _sizes(p: Any, requests: Passes) -> list[PixelSize]:
    """Return the sizes of the passes with a delta, the hires pass last."""
    first, second = (requests.of(hires).wanted and requests.of(hires).in_pass(hires) for hires in (False, True))
    if not (second and getattr(p, "enable_hr", False)):
        return [(p.height, p.width)]
    # The enlarged image is cropped to the requested size if the proportions differ.
    down, across = (LATENT_STRIDE * getattr(p, name, 0) for name in ("truncate_y", "truncate_x"))
    hires = p.hr_upscale_to_y - down, p.hr_upscale_to_x - across
    return [(p.height, p.width), hires] if first else [hires]


def with_unit_axes(request: Request, axes: Mapping[str, Any]) -> Request:
    """Apply an XYZ cell's values to the first enabled unit; raises :class:`SettingError` without one."""
    values = {field: axes[axis] for axis, field in UNIT_AXES.items() if axis in axes}
    if not values:
        return request
    index = next((i for i, unit in enumerate(request.units) if unit.enabled), None)
    if index is None:
        raise SettingError("the plot has an axis for a unit of Delta Sampling, but no unit is on: switch one on")
    changed = replace(request.units[index], **values)
    if not changed.model:  # the axis' value None: the image without the unit
        changed = replace(changed, enabled=False)
    return replace(request, units=(*request.units[:index], changed, *request.units[index + 1 :]))


def plotted(of_cell: Sequence[Unit], of_accordion: Sequence[Unit]) -> tuple[Unit, ...]:
    """Return the units of a plot, given those of one cell, with the unit that this cell disables enabled."""
    return tuple(
        chosen if chosen.enabled and not unit.enabled else unit
        for unit, chosen in zip(of_cell, of_accordion, strict=True)
    )
