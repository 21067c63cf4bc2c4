"""What the extension stores on a generation's ``p`` (StableDiffusionProcessing)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib_delta.errors import DeltaError
    from lib_delta.hosts.generation.run import Run
    from lib_delta.request.request import Request

REQUEST_ATTRIBUTE, RUN_ATTRIBUTE, AXES_ATTRIBUTE = "delta_sampling_request", "delta_sampling_run", "delta_sampling_axes"


def request_of(p: Any) -> Request | DeltaError | None:
    """Return the accordion's request, or the error in it; None if the script has not run."""
    request: Request | DeltaError | None = getattr(p, REQUEST_ATTRIBUTE, None)
    return request


def run_of(p: Any) -> Run | None:
    """Return the run of the batch that is being sampled; None if it has no delta."""
    run: Run | None = getattr(p, RUN_ATTRIBUTE, None)
    return run


def axes_of(p: Any) -> dict[str, Any]:
    """Return the values that the axes of an XYZ plot set; empty outside a plot."""
    axes: dict[str, Any] = getattr(p, AXES_ATTRIBUTE, {})
    return axes


def clear_request(p: Any) -> None:
    """Remove the request and the axes' values after a generation."""
    for name in (REQUEST_ATTRIBUTE, AXES_ATTRIBUTE):
        vars(p).pop(name, None)
