"""What makes maps of pictures: the WebUI's own preprocessors where it has some, and canny through OpenCV always."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lib_delta.errors import DeltaError, SettingError, near, shown
from lib_delta.request.fields import PREPROCESSOR_DEFAULT

Pixels = np.ndarray[Any, Any]
RESOLUTION, LOW, HIGH = 512, 100, 200
CANNY = "canny"
# How the names of CLIP's image encoders end or start among preprocessors: Forge's, and the ControlNet extension's.
ENCODERS_END, ENCODERS_START = "(ipadapter)", ("ip-adapter-auto", "ip-adapter_clip")


def names() -> list[str]:
    """Return the names of the preprocessors, canny first."""
    return [CANNY, *sorted(name for name in _of_webui() if name != CANNY)]


def encodes(name: str) -> bool:
    """Tell the name of an image encoder for IP-Adapters, which the WebUIs have among their preprocessors.

    Those that look at faces through InsightFace are others.
    """
    name = name.lower()
    of_clip = name.endswith(ENCODERS_END) or name.startswith(ENCODERS_START)
    return of_clip and not name.startswith("insightface")


def pixel_perfect(height: int, width: int, wanted: tuple[int, int], fill: bool) -> int:
    """Return the shorter side at which a picture's map fits a size, as the ControlNet extensions find it."""
    scales = wanted[0] / height, wanted[1] / width
    return round((min(scales) if fill else max(scales)) * min(height, width))


def run(name: str, picture: Pixels, resolution: int, a: float, b: float) -> Pixels:
    """Make the map ``(H, W, 3)`` of a picture ``(H, W, 3)``, both in bytes; numbers of :data:`PREPROCESSOR_DEFAULT`
    are its own.

    Raises :class:`SettingError` for a name that is not known, and :class:`DeltaError` where it fails.
    """
    if encodes(name):
        raise SettingError(
            f"{name} lets an IP-Adapter see a picture, and makes no map for a ControlNet: choose another preprocessor"
        )
    found = _of_webui().get(name) or _by_short_name(name)
    if found is None and name != CANNY:
        raise SettingError(f"there is no preprocessor {shown(name)}{near(name, names())}")
    try:
        made = (
            canny(picture, resolution, a, b)
            if found is None
            else _run_webui_preprocessor(found, picture, resolution, a, b)
        )
    except DeltaError:
        raise
    except Exception as error:  # whatever a preprocessor does, the user hears of it
        raise DeltaError(
            f"the preprocessor {name} failed ({type(error).__name__}: {error}): the console has the details, and a"
            " picture that is a map already needs none"
        ) from error
    return _as_map(name, made)


def canny(
    picture: Pixels,
    resolution: int = PREPROCESSOR_DEFAULT,
    low: float = PREPROCESSOR_DEFAULT,
    high: float = PREPROCESSOR_DEFAULT,
) -> Pixels:
    """Return the edges of a picture, white on black, ``resolution`` being its shorter side."""
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise SettingError("canny needs OpenCV: install opencv-python in the WebUI's environment") from error
    scale = (RESOLUTION if resolution == PREPROCESSOR_DEFAULT else resolution) / min(picture.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in (picture.shape[1], picture.shape[0]))
    resized = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    edges: Pixels = cv2.Canny(
        resized, LOW if low == PREPROCESSOR_DEFAULT else low, HIGH if high == PREPROCESSOR_DEFAULT else high
    )
    return edges


def _as_map(name: str, made: Any) -> Pixels:
    if not isinstance(made, np.ndarray) or made.ndim not in (2, 3) or (made.ndim == 3 and made.shape[2] not in (1, 3)):
        raise SettingError(f"the preprocessor {name} makes no map that Delta Sampling can follow: choose another")
    three = made[..., None] if made.ndim == 2 else made
    return np.ascontiguousarray(np.broadcast_to(three, (*made.shape[:2], 3)).clip(0, 255).astype(np.uint8))


def _of_webui() -> Mapping[str, Any]:
    """Return those of the WebUI's preprocessors that make maps for models: Forge's, or the ControlNet extension's."""
    forge: Any = sys.modules.get("modules_forge.shared")
    extension: Any = sys.modules.get("scripts.supported_preprocessor")
    known = dict(getattr(forge, "supported_preprocessors", {}))
    if extension is not None:
        known |= getattr(extension.Preprocessor, "all_processors", {})
    return {name: found for name, found in known.items() if name.lower() != "none" and _makes_maps(found)}


def _by_short_name(name: str) -> Any:
    """Find a preprocessor of the ControlNet extension as its API may call it, ``depth`` for ``depth_midas``."""
    extension: Any = sys.modules.get("scripts.supported_preprocessor")
    found = getattr(getattr(extension, "Preprocessor", None), "all_processors_by_name", {}).get(name)
    return found if found is not None and _makes_maps(found) else None


def _makes_maps(preprocessor: Any) -> bool:
    """Leave out those that embed pictures, patch the main model, or need a mask."""
    without_model = getattr(preprocessor, "do_not_need_model", False) or not preprocessor.show_control_mode
    other = not getattr(preprocessor, "returns_image", True) or "Inpaint" in preprocessor.tags
    return not (without_model or other)


def _run_webui_preprocessor(preprocessor: Any, picture: Pixels, resolution: int, a: float, b: float) -> Any:
    wanted = {"slider_resolution": resolution, "slider_1": a, "slider_2": b}
    values = [
        _default_of(preprocessor, name) if value == PREPROCESSOR_DEFAULT else value for name, value in wanted.items()
    ]
    call: Callable[..., Any] = getattr(preprocessor, "cached_call", preprocessor)
    made = call(picture, resolution=int(values[0]), slider_1=values[1], slider_2=values[2])
    return getattr(made, "display_images", [made])[0]


def _default_of(preprocessor: Any, name: str) -> Any:
    return getattr(preprocessor, name).gradio_update_kwargs["value"]
