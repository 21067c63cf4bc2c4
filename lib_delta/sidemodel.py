"""The source's models in memory: loaded when they are first needed, kept, and given back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lib_delta.adapters.apply import AdaptedTower, Form, attach, detach, text_parameters
from lib_delta.adapters.load import AdapterFile, load_adapter
from lib_delta.checkpoint import Report, WeightFile, load_unet
from lib_delta.errors import CheckpointError, DeltaError
from lib_delta.families import Family
from lib_delta.models.text import TextEncoder, load_towers
from lib_delta.parameterization import Parameterization, Schedule


@dataclass(frozen=True)
class AdapterPick:
    """An adapter's file (a LoRA or a fine-tuned checkpoint) and its weights for UNet and text encoder."""

    path: Path
    weight: float = 1.0
    text_weight: float = 1.0


@dataclass(frozen=True)
class FileState:
    """A file as it was when it was read: another time or size means another file."""

    path: Path
    modified: int
    size: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Look at a file; raises :class:`CheckpointError` if it cannot be."""
        try:
            found = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): a model file is needed") from error
        return cls(path, found.st_mtime_ns, found.st_size)


class SideModel:
    """An SD 1.x base, its text encoder, and what is attached to it."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        """Load a checkpoint's UNet and text encoder on the CPU, in ``dtype``.

        Raises :class:`CheckpointError` unless it is a whole, ordinary SD 1.x checkpoint.
        """
        self.name = path.name
        with WeightFile.open(path) as file:
            self.unet, self.report = load_unet(file, dtype)
            _refuse_unfit(file.name, self.report)
            self.tower: TextEncoder = load_towers(file, self.report.family, dtype)[0]
        self.parameterization = Parameterization(
            self.report.prediction, Schedule.stable_diffusion(self.report.zero_terminal_snr)
        )
        self.adapters: tuple[AdapterFile, ...] = ()
        self._files: dict[FileState, AdapterFile] = {}
        self._text: dict[str, torch.Tensor] = {}
        self._attached: object = None

    def adapt(self, picks: Sequence[AdapterPick], form: Form) -> None:
        """Attach adapters in place of those there were; files that stay are not read again.

        Raises :class:`AdapterError` for a file that cannot be used; the model is then the base alone.
        """
        states = [FileState.of(pick.path) for pick in picks]
        wanted = tuple(zip(states, picks)), form
        if wanted == self._attached:
            return
        self._release()
        for state in states:
            if state not in self._files:
                self._files[state] = load_adapter(state.path, self.unet, [self.tower])
        self.adapters = tuple(self._files[state] for state in states)
        attach(self.unet, [(file, pick.weight) for file, pick in zip(self.adapters, picks)], form)
        self._text = text_parameters(self.tower, [(f, pick.text_weight) for f, pick in zip(self.adapters, picks)])
        self._files = {state: self._files[state] for state in states}
        self._attached = wanted

    def _release(self) -> None:
        self._attached, self.adapters, self._text = None, (), {}
        detach(self.unet)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the UNet computes in."""
        return next(self.unet.parameters()).dtype

    @property
    def memory(self) -> int:
        """Bytes of the weights of UNet, merged adapters and text encoder."""
        tensors = (t for module in (self.unet, self.tower) for t in (*module.parameters(), *module.buffers()))
        return sum(t.numel() * t.element_size() for t in tensors)

    @contextmanager
    def text_on(self, device: torch.device) -> Iterator[tuple[TextEncoder, TextEncoder]]:
        """Have the text encoders of base and adapted on a device for a while; one and the same if nothing differs."""
        home = next(self.tower.parameters()).device
        self.tower.to(device)
        try:
            changed = {name: tensor.to(device) for name, tensor in self._text.items()}
            yield self.tower, AdaptedTower(self.tower, changed) if changed else self.tower
        finally:
            self.tower.to(home)


def _refuse_unfit(name: str, report: Report) -> None:
    if report.family is not Family.SD1:
        raise CheckpointError(
            f"{name} is a model of {report.family.label}, and the base of Delta Sampling has to be an SD 1.x checkpoint"
        )
    if report.variant != "standard":
        raise CheckpointError(f"{name} is an {report.variant} model: an ordinary SD 1.x checkpoint is needed as base")
    if "text encoder" in report.missing:
        raise CheckpointError(f"{name} has no text encoder: a whole SD 1.x checkpoint is needed as base")


class SideModels:
    """The bases in memory, the most lately used ones."""

    def __init__(self) -> None:
        self._models: OrderedDict[tuple[FileState, torch.dtype], SideModel] = OrderedDict()

    def get(self, path: Path, dtype: torch.dtype, limit: int = 1) -> SideModel:
        """Return a base, loaded if need be; beyond ``limit`` the one longest unused is given back."""
        key = FileState.of(path), dtype
        if key not in self._models:
            # Room first: two bases at once may be more than fits.
            self._shrink(limit - 1)
            self._models[key] = SideModel(path, dtype)
        self._models.move_to_end(key)
        self._shrink(limit)
        return self._models[key]

    def _shrink(self, limit: int) -> None:
        while len(self._models) > max(limit, 0):
            self._models.popitem(last=False)

    def clear(self) -> None:
        """Give everything back."""
        self._models.clear()

    def __iter__(self) -> Iterator[SideModel]:
        return iter(tuple(self._models.values()))


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on a GPU or in RAM."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error)


def sentence(error: BaseException, doing: str) -> DeltaError:
    """Turn whatever went wrong while ``doing`` something into an error for users."""
    if isinstance(error, DeltaError):
        return error
    if out_of_memory(error):
        return DeltaError(
            f"out of memory while {doing}: choose low-rank factors and fp16 in Settings > Delta Sampling, "
            "a smaller picture or batch, or the CPU as its device"
        )
    return DeltaError(f"{doing} failed ({type(error).__name__}: {error}): the console has the details")
