"""Preprocessors: the WebUI's, if it has any, and canny through OpenCV in any case."""

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
# Ends and starts of the names of CLIP image encoders, in Forge and in the ControlNet extension.
ENCODERS_END, ENCODERS_START = "(ipadapter)", ("ip-adapter-auto", "ip-adapter_clip")


def names() -> list[str]:
    """Return the preprocessors' names, canny first."""
    return [CANNY, *sorted(name for name in _of_webui() if name != CANNY)]


def encodes(name: str) -> bool:
    """Return whether a name is that of a CLIP image encoder, which WebUIs list among their preprocessors.

    Encoders that read faces through InsightFace are excluded.
    """
    name = name.lower()
    of_clip = name.endswith(ENCODERS_END) or name.startswith(ENCODERS_START)
    return of_clip and not name.startswith("insightface")


def pixel_perfect(height: int, width: int, size: tuple[int, int], *, fill: bool) -> int:
    """Return the shorter side at which a picture's map fits a size, by the ControlNet extensions' formula."""
    scales = size[0] / height, size[1] / width
    return round((min(scales) if fill else max(scales)) * min(height, width))


def run(name: str, picture: Pixels, *, resolution: int, a: float, b: float) -> Pixels:
    """Return the map ``(H, W, 3)`` of a picture ``(H, W, 3)``, both in bytes.

    Numbers equal to :data:`PREPROCESSOR_DEFAULT` select the preprocessor's defaults.  Raises :class:`SettingError` for
    an unknown name, and :class:`DeltaError` if the preprocessor fails.
    """
    if encodes(name):
        raise SettingError(
            f"{name} lets an IP-Adapter see a picture, and makes no map for a ControlNet: choose another preprocessor"
        )
    preprocessor = _of_webui().get(name) or _by_short_name(name)
    if preprocessor is None and name != CANNY:
        raise SettingError(f"there is no preprocessor {shown(name)}{near(name, names())}")
    try:
        result = (
            canny(picture, resolution, a, b)
            if preprocessor is None
            else _run_webui_preprocessor(preprocessor, picture, resolution=resolution, a=a, b=b)
        )
    except DeltaError:
        raise
    except Exception as error:  # report any failure of a preprocessor to the user
        raise DeltaError(
            f"the preprocessor {name} failed ({type(error).__name__}: {error}): the console has the details, and a"
            " picture that is a map already needs none"
        ) from error
    return _as_map(name, result)


def canny(
    picture: Pixels,
    resolution: int = PREPROCESSOR_DEFAULT,
    low: float = PREPROCESSOR_DEFAULT,
    high: float = PREPROCESSOR_DEFAULT,
) -> Pixels:
    """Return a picture's edges, white on black; ``resolution`` is the shorter side."""
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


def _as_map(name: str, result: Any) -> Pixels:
    if not isinstance(result, np.ndarray) or result.ndim not in (2, 3) or result.shape[2:] not in ((), (1,), (3,)):
        raise SettingError(f"the preprocessor {name} makes no map that Delta Sampling can follow: choose another")
    channels_last = result[..., None] if result.ndim == 2 else result
    return np.ascontiguousarray(np.broadcast_to(channels_last, (*result.shape[:2], 3)).clip(0, 255).astype(np.uint8))


def _of_webui() -> Mapping[str, Any]:
    """Return the WebUI's preprocessors that make maps for models: Forge's, and the ControlNet extension's."""
    forge: Any = sys.modules.get("modules_forge.shared")
    extension: Any = sys.modules.get("scripts.supported_preprocessor")
    known = dict(getattr(forge, "supported_preprocessors", {}))
    if extension is not None:
        known |= getattr(extension.Preprocessor, "all_processors", {})
    return {name: each for name, each in known.items() if name.lower() != "none" and _makes_maps(each)}


def _by_short_name(name: str) -> Any:
    """Find a preprocessor of the ControlNet extension by its short name in the API (``depth`` for ``depth_midas``)."""
    extension: Any = sys.modules.get("scripts.supported_preprocessor")
    known = getattr(getattr(extension, "Preprocessor", None), "all_processors_by_name", {})
    preprocessor = known.get(name)
    return preprocessor if preprocessor is not None and _makes_maps(preprocessor) else None


def _makes_maps(preprocessor: Any) -> bool:
    """Return whether a preprocessor makes maps; others embed pictures, patch the main model, or need a mask."""
    for_control_model = not getattr(preprocessor, "do_not_need_model", False) and preprocessor.show_control_mode
    returns_map = getattr(preprocessor, "returns_image", True) and "Inpaint" not in preprocessor.tags
    return bool(for_control_model and returns_map)


def _run_webui_preprocessor(preprocessor: Any, picture: Pixels, *, resolution: int, a: float, b: float) -> Any:
    sliders = {"slider_resolution": resolution, "slider_1": a, "slider_2": b}
    values = [
        _default_of(preprocessor, name) if value == PREPROCESSOR_DEFAULT else value for name, value in sliders.items()
    ]
    call: Callable[..., Any] = getattr(preprocessor, "cached_call", preprocessor)
    result = call(picture, resolution=int(values[0]), slider_1=values[1], slider_2=values[2])
    return getattr(result, "display_images", [result])[0]


def _default_of(preprocessor: Any, name: str) -> Any:
    return getattr(preprocessor, name).gradio_update_kwargs["value"]
