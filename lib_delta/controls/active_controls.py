"""The controls of a generation: their files and image prompts, cached while the same controls stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
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
# The cache key of tokens: the IP-Adapter's file, the pictures' digest, and the image encoder's file.
TokensKey = tuple[FileState, str, FileState]


@dataclass(frozen=True, eq=False)
class ControlPick:
    """A ControlNet's, T2I-Adapter's or IP-Adapter's file, its pictures, its weight and its range.

    ``pictures`` are ``(1, 3, H, W)`` in [0, 1].  For a ControlNet or T2I-Adapter, they are one map, or one for each
    image of the batch, all of one size.  For an IP-Adapter, they are its image prompts, of any size.  ``start`` and
    ``end`` are progress, from 0 to 1.

    Options for maps: ``mode``; ``resize``; ``mask`` ``(1, 1, H, W)``, 1 where img2img paints, which hides pixels from
    the ControlNet for inpainting; ``larger``, maps for a larger pass, if they differ; ``frames`` as in
    :class:`ControlMap`.  Options for image prompts: ``weight_type``; ``encoders``, candidates for the image encoder, of
    which the first that fits is used.
    """

    path: Path
    pictures: Sequence[Tensor]
    weight: float = 1.0
    _: KW_ONLY
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
    """The controls of a UNet; unchanged files and image prompts are neither read nor encoded again."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet
        self.guides: tuple[TimedGuide, ...] = ()
        self._files: dict[FileState, ControlFile] = {}
        self._tokens: dict[TokensKey, Tokens] = {}

    @property
    def files(self) -> list[ControlFile]:
        """The files in memory."""
        return list(self._files.values())

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that have to be on the UNet's device."""
        return [file.model for file in self._files.values()]

    def set_picks(self, picks: Sequence[ControlPick]) -> None:
        """Replace the controls.

        Raises :class:`AdapterError` or :class:`CheckpointError` for a file that cannot be used, and
        :class:`SettingError` for a wrong setting; no control is active then.
        """
        self.guides = ()
        try:
            states = [FileState.of(pick.path) for pick in picks]
            # Drop unused files before reading others.
            self._files = {state: self._files[state] for state in states if state in self._files}
            for state in states:
                if state not in self._files:
                    self._files[state] = load_control(state.path, self.unet, device="cpu")
            prompts = [self._image_prompt(state, pick) for state, pick in zip(states, picks)]
            self._tokens = dict(prompt for prompt in prompts if prompt is not None)
            guides = [
                self._guide(self._files[state], pick, prompt) for state, pick, prompt in zip(states, picks, prompts)
            ]
        except BaseException:
            self._files, self._tokens = {}, {}
            raise
        self.guides = tuple(guides)

    def _guide(self, file: ControlFile, pick: ControlPick, prompt: tuple[TokensKey, Tokens] | None) -> TimedGuide:
        if prompt is not None:
            guide = prompt_by(file, self.unet, prompt[1], pick.weight, weight_type=pick.weight_type)
        else:
            hidden = pick.mask if file.fills else None
            larger = _combined(file, pick.larger) if pick.larger else None
            control_map = ControlMap(
                _combined(file, pick.pictures), pick.resize, hidden=hidden, larger=larger, frames=pick.frames
            )
            guide = follow(file, self.unet, control_map, pick.weight, mode=pick.mode)
        return TimedGuide(guide, pick.start, pick.end)

    def _image_prompt(self, state: FileState, pick: ControlPick) -> tuple[TokensKey, Tokens] | None:
        """Return an image prompt's tokens with their cache key; None for a file that reads maps."""
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
