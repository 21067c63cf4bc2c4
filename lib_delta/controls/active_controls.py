"""The controls of a generation, as hosts ask for them: files and pictures, kept in memory while they stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lib_delta.controls.control_file import ControlFile, load_control
from lib_delta.controls.control_map import ControlMap, MapSize, ResizeMode
from lib_delta.controls.guides import Mode, WeightType, follow, prompt_by
from lib_delta.controls.image_encoder import choose_encoder, image_tokens, load_image_encoder
from lib_delta.controls.picture_file import picture_digest
from lib_delta.core.guides import TimedGuide
from lib_delta.errors import SettingError
from lib_delta.files.weight_file import FileState
from lib_delta.models.ip_adapter import IPAdapter
from lib_delta.models.unet import UNet

Tokens = tuple[Tensor, Tensor]
# The IP-Adapter, the pictures, and the image encoder that it saw them through.
Look = tuple[FileState, str, FileState]


@dataclass(frozen=True, eq=False)
class ControlPick:
    """A ControlNet's, T2I-Adapter's or IP-Adapter's file, what it looks at, how strong it is and when.

    ``pictures`` are ``(1, 3, H, W)`` in [0, 1]: one map, or one for each image of the batch, all of a size; or the
    pictures to prompt with, of any size.  ``mode`` and ``resize`` are of maps, ``weight_type`` is of image prompts,
    as are ``encoders``: files of image encoders, of which the one that fits is taken.  ``mask`` ``(1, 1, H, W)`` is
    where img2img paints (1): what the ControlNet for inpainting is not shown, and others are.  ``larger`` are the maps
    made anew for a larger pass, where they were, and ``frames`` is as in :class:`ControlMap`.
    """

    path: Path
    pictures: Sequence[Tensor]
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: Mode = "balanced"
    resize: ResizeMode = "crop and resize"
    weight_type: WeightType = "linear"
    encoders: Sequence[Path] = ()
    mask: Tensor | None = None
    larger: Sequence[Tensor] = ()
    frames: Sequence[tuple[MapSize, MapSize]] = ()


class ActiveControls:
    """What steers a UNet besides its weights.  Files and tokens that stay are not read or made again."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet
        self.guides: tuple[TimedGuide, ...] = ()
        self._files: dict[FileState, ControlFile] = {}
        self._tokens: dict[Look, Tokens] = {}

    @property
    def files(self) -> list[ControlFile]:
        """The files in memory."""
        return list(self._files.values())

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that are to be where the UNet is."""
        return [file.model for file in self._files.values()]

    def set_picks(self, picks: Sequence[ControlPick]) -> None:
        """Have these controls in place of those there were.

        Raises :class:`AdapterError` or :class:`CheckpointError` for a file that cannot be used, and
        :class:`SettingError` for settings; there are then no controls.
        """
        self.guides = ()
        try:
            states = [FileState.of(pick.path) for pick in picks]
            # Those that are no longer needed make room before others are read.
            self._files = {state: self._files[state] for state in states if state in self._files}
            for state in states:
                if state not in self._files:
                    self._files[state] = load_control(state.path, self.unet, device="cpu")
            seen = [self._seen(state, pick) for state, pick in zip(states, picks)]
            self._tokens = dict(entry for entry in seen if entry is not None)
            guides = [self._guide(self._files[state], pick, entry) for state, pick, entry in zip(states, picks, seen)]
        except BaseException:
            self._files, self._tokens = {}, {}
            raise
        self.guides = tuple(guides)

    def _guide(self, file: ControlFile, pick: ControlPick, seen: tuple[Look, Tokens] | None) -> TimedGuide:
        if seen is not None:
            guide = prompt_by(file, self.unet, seen[1], pick.weight, pick.weight_type)
        else:
            hidden = pick.mask if file.fills else None
            larger = _combined(file, pick.larger) if pick.larger else None
            picture = ControlMap(_combined(file, pick.pictures), pick.resize, hidden, larger, pick.frames)
            guide = follow(file, self.unet, picture, pick.weight, pick.mode)
        return TimedGuide(guide, pick.start, pick.end)

    def _seen(self, state: FileState, pick: ControlPick) -> tuple[Look, Tokens] | None:
        """Return an image prompt's tokens and what they are known by; None for what reads maps."""
        file = self._files[state]
        if not isinstance(file.model, IPAdapter):
            return None
        encoder = FileState.of(choose_encoder(file, pick.encoders))
        key = state, picture_digest(pick.pictures), encoder
        tokens = self._tokens.get(key)
        if tokens is None:
            tokens = image_tokens(file, load_image_encoder(encoder.path), pick.pictures)
        return key, tokens


def _combined(file: ControlFile, pictures: Sequence[Tensor]) -> Tensor:
    if not pictures:
        raise SettingError(f"{file.name} has no map to follow: a picture is needed")
    sizes = {tuple(picture.shape[1:]) for picture in pictures}
    if len(sizes) > 1:
        raise SettingError(f"the maps for {file.name} are of several sizes, and maps for a batch need the same one")
    return torch.cat(list(pictures))
