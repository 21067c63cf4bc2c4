"""The errors that users see: one sentence that says what is wrong, with which file, and what to do."""

from __future__ import annotations


class DeltaError(Exception):
    """Anything that Delta Sampling refuses or cannot do."""


class CheckpointError(DeltaError):
    """A model file that cannot be used: unreadable, not a checkpoint, or of another family."""


class AdapterError(DeltaError):
    """An adapter file that cannot be used, or that belongs to another family."""


class SettingError(DeltaError):
    """A setting outside the values allowed."""
