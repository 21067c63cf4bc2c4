"""The source's models in memory: loaded at first use, cached, and evicted."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib_delta.adapters.adapter_file import AdapterFile, load_adapter
from lib_delta.adapters.attach import AdaptedTextEncoder, AdapterForm, Weight, adapted_text_parameters, attach, detach
from lib_delta.adapters.block_weights import BlockWeights
from lib_delta.controls.active_controls import ActiveControls, ControlPick
from lib_delta.devices import indexed, out_of_memory, trim_heap, without_autocast
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import Parameterization, Schedule
from lib_delta.errors import CheckpointError, DeltaError
from lib_delta.files.checkpoint import why_not_base
from lib_delta.files.weight_file import FileState, WeightFile
from lib_delta.lru_cache import LRUCache
from lib_delta.models.forked_layers import Conv2d, Linear
from lib_delta.models.loading import load_unet
from lib_delta.models.text import TextEncoder, load_towers
from lib_delta.models.unet import UNet
from lib_delta.runtime.placement import CPU, Restorable, Stream, Visit, copy_to_device

# Adapter files cached in CPU memory while others are attached: room for a few LoRAs, but no checkpoint.
ADAPTER_CACHE_BYTES = 512 * 2**20
MAX_CACHED_PROMPTS_PER_BASE = 16  # passes whose encoded prompts are cached


@dataclass(frozen=True)
class AdapterPick:
    """An adapter's file (a LoRA or a fine-tuned checkpoint, for instance) and its weights.

    ``blocks`` are block weights for the UNet (:class:`BlockWeights`; empty: 1 for all).  ``text_weight`` includes them
    already.  ``rank`` is the number of ranks to use of a DyLoRA.
    """

    path: Path
    weight: float = 1.0
    text_weight: float = 1.0
    blocks: str = ""
    rank: int | None = None

    def unet_weight(self) -> Weight:
        """Return the weight for the whole UNet, or for each of its layers."""
        if not self.blocks:
            return self.weight
        blocks = BlockWeights.parse(self.blocks)
        return lambda path: self.weight * blocks.at(path)


class SideModel:
    """A base of any supported family with its text encoders, adapters and controls.

    ``towers`` are its text encoders in the order of their joined outputs: CLIP-L (SD 1.x), OpenCLIP-H (SD 2.x), or
    CLIP-L and OpenCLIP-G (SDXL).
    """

    # Leave inference mode, in which Forge loads models: its tensors can only be written to in that mode.
    @torch.inference_mode(False)
    def __init__(self, path: Path, dtype: torch.dtype, storage: torch.dtype | None = None) -> None:
        """Load a checkpoint's UNet and text encoders to the CPU, in ``dtype``.

        ``storage`` is a smaller type, such as fp8, that stores the UNet's matrices, which are cast when they compute.
        Raises :class:`CheckpointError` unless the file is a whole, ordinary checkpoint of a supported family.
        """
        self.name = path.name
        if fault := why_not_base(path):  # before building anything
            raise CheckpointError(fault)
        with WeightFile.open(path) as file:
            self.unet, self.report = load_unet(file, dtype)
            if storage is not None:
                _store_as(self.unet, storage)
            self.towers = load_towers(file, self.report.family, dtype)
        self.parameterization = Parameterization(
            self.report.prediction, Schedule.stable_diffusion(self.report.zero_terminal_snr)
        )
        self.adapters: tuple[AdapterFile, ...] = ()
        self._picks: tuple[AdapterPick, ...] = ()
        self._form: AdapterForm = "merged"
        self._files: LRUCache[tuple[FileState, int | None], AdapterFile] = LRUCache(size_of=AdapterFile.memory)
        self._attached: object = None
        self._copy: Restorable | None = None
        self._states: tuple[FileState, ...] = ()
        # Encoded prompts, by everything that they depend on; hosts fill it.
        self.prompt_cache: LRUCache[object, Any] = LRUCache(max_count=MAX_CACHED_PROMPTS_PER_BASE)
        self.controls = ActiveControls(self.unet)
        # The modules that sampling needs on the device: the UNet, and the controls' networks if there are any.
        self.network: nn.Module = self.unet

    @torch.inference_mode(False)
    def set_controls(self, picks: Sequence[ControlPick]) -> None:
        """Replace the controls (ControlNets, image prompts).

        Raises the errors of :meth:`ActiveControls.set_picks`.
        """
        before = self.controls.networks
        try:
            with without_autocast(torch.device("cpu")):
                self.controls.set_picks(picks)
        finally:
            networks = self.controls.networks
            if list(map(id, networks)) != list(map(id, before)):
                parts = {"unet": self.unet, "controls": nn.ModuleList(networks)}
                self.network = nn.ModuleDict(parts) if networks else self.unet

    @torch.inference_mode(False)
    def adapt(self, picks: Sequence[AdapterPick], form: AdapterForm) -> None:
        """Replace the attached adapters; recently used files are not read again.

        Raises :class:`AdapterError` for a file that cannot be used, and then leaves the plain base.
        """
        try:
            states = [FileState.of(pick.path) for pick in picks]
            keys = [(state, pick.rank) for state, pick in zip(states, picks)]
            files = {key: self._files.get(key) for key in keys}
            # Evict large unused files before reading others.
            self._files.evict(max_size=ADAPTER_CACHE_BYTES, min_count=sum(file is not None for file in files.values()))
            for state, rank in keys:
                adapter = files[state, rank] or self._read(state.path).with_rank(rank)
                files[state, rank] = adapter
                self._files.put((state, rank), adapter)
            self.adapters = tuple(file for key in keys if (file := files[key]) is not None)
            self._files.evict(max_size=ADAPTER_CACHE_BYTES, min_count=len(files))
        except BaseException:
            self._release()
            raise
        self._picks, self._form, self._states = tuple(picks), form, tuple(states)
        self.activate()

    def _read(self, path: Path) -> AdapterFile:
        with without_autocast(torch.device("cpu")):
            return load_adapter(path, self.unet, self.towers, self.report.prediction)

    # Leave inference mode, in which hosts sample: its tensors could not be written to later.
    @torch.inference_mode(False)
    def activate(self, active: Sequence[bool] = ()) -> None:
        """Apply only the active adapters; reads and loads nothing.

        ``active`` has a flag for each adapter, in their order.  Adapters without a flag are active.
        """
        chosen = self._active(active), self._form
        if chosen == self._attached:
            return
        self._attached = None
        attach(self.unet, [(file, pick.unet_weight()) for file, pick in chosen[0]], self._form)
        self._attached = chosen

    def _active(self, active: Sequence[bool]) -> list[tuple[AdapterFile, AdapterPick]]:
        flags = itertools.chain(active, itertools.repeat(True))
        return [(file, pick) for file, pick, on in zip(self.adapters, self._picks, flags) if on]

    def _release(self) -> None:
        self._attached, self.adapters, self._picks = None, (), ()
        self._files.clear()
        detach(self.unet)

    @torch.inference_mode(False)
    def move_to(self, device: torch.device) -> None:
        """Move the UNet and the controls' networks to a device, to stay there."""
        self.offload()
        self.network.to(device)

    @torch.inference_mode(False)
    def copy_to(self, device: torch.device) -> None:
        """Copy the UNet and the controls' networks to a device until :meth:`offload`; the originals stay in CPU memory.

        If they are copied there already, only weights that were added since are copied.
        """
        if isinstance(self._copy, Visit) and self._copy.is_for(self.network, device):
            self._copy.sync()
        else:
            self.move_to(CPU)
            self._copy = copy_to_device(self.network, device)

    @torch.inference_mode(False)
    def stream_to(self, device: torch.device) -> None:
        """Compute on a device block by block, each there only while it runs: slowest, with the least memory."""
        self.move_to(CPU)
        self._copy = Stream(self.unet, self.controls.networks, device)

    def offload(self) -> None:
        """Return all weights to CPU memory after :meth:`copy_to` or :meth:`stream_to`."""
        placed, self._copy = self._copy, None
        if placed is not None:
            placed.restore()

    @property
    def streamed_bytes(self) -> int:
        """The bytes of a stream's largest part, which is on the device only while it runs; 0 without a stream."""
        return self._copy.largest_part if isinstance(self._copy, Stream) else 0

    def elsewhere(self, device: torch.device) -> int:
        """Return the bytes of the weights that sampling needs on a device and that are not there yet."""
        device = indexed(device)
        weights = (*self.network.parameters(), *self.network.buffers())
        return sum(weight.nbytes for weight in weights if weight.device != device)

    @property
    def embeddings(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """Textual inversions of the adapters' files, ``(vectors, width)`` for each text encoder, by name."""
        return {name: vectors for file in self.adapters for name, vectors in file.embeddings.items()}

    @property
    def embedding_files(self) -> tuple[FileState, ...]:
        """The adapters' files that contain textual inversions."""
        return tuple(state for state, file in zip(self._states, self.adapters) if file.embeddings)

    @property
    def family(self) -> Family:
        """The base's family."""
        return self.report.family

    @property
    def device(self) -> torch.device:
        """The UNet's device."""
        return self.unet.entry.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the UNet computes in."""
        return self.unet.entry.dtype

    @property
    def memory(self) -> int:
        """The bytes of all weights: UNet, merged adapters, controls and text encoders."""
        tensors = (t for module in (self.network, *self.towers) for t in (*module.parameters(), *module.buffers()))
        return sum(t.numel() * t.element_size() for t in tensors)

    @contextmanager
    def text_on(self, device: torch.device) -> Iterator[tuple[TextEncoder, ...]]:
        """Move the base's text encoders to a device for the duration of the context."""
        homes = [next(tower.parameters()).device for tower in self.towers]
        try:
            yield tuple(tower.to(device) for tower in self.towers)
        finally:
            for tower, home in zip(self.towers, homes):
                tower.to(home)

    def text_state(self, active: Sequence[bool] = ()) -> tuple[object, ...]:
        """Return a key for the text encoders with the active adapters; empty if they do not change them."""
        flags = itertools.chain(active, itertools.repeat(True))
        adapters = zip(self.adapters, self._picks, self._states, flags)
        return tuple(
            (state, pick.rank, pick.text_weight)
            for file, pick, state, on in adapters
            if on and pick.text_weight and any(file.text)
        )

    def adapted_towers(self, active: Sequence[bool] = ()) -> tuple[TextEncoder, ...]:
        """Return the text encoders with the active adapters, on their present devices.

        ``active`` is as in :meth:`activate`.  An encoder that they do not change is the base's.
        """
        chosen = [(file, pick.text_weight) for file, pick in self._active(active)]
        changed = [adapted_text_parameters(tower, chosen, index) for index, tower in enumerate(self.towers)]
        return tuple(
            AdaptedTextEncoder(tower, parameters) if parameters else tower
            for tower, parameters in zip(self.towers, changed)
        )


def can_be_base(path: Path) -> bool:
    """Return whether a checkpoint can be a base, by its header, which is read once while the file is unchanged."""
    return not why_not_base(path)


def _store_as(unet: UNet, storage: torch.dtype) -> None:
    """Store a UNet's matrices in a smaller type, except the small and most sensitive ones at its ends."""
    for path, layer in unet.named_modules():
        if isinstance(layer, (Linear, Conv2d)) and "block" in path and not path.startswith("input_blocks.0."):
            layer.store_as(storage)


class SideModels:
    """The most recently used bases in memory.

    ``on_evict`` is called with evicted models before their memory is needed, so that it can drop other references to
    them.
    """

    def __init__(self, on_evict: Callable[[Sequence[SideModel]], None] = lambda _evicted: None) -> None:
        self._on_evict = on_evict
        self._models: LRUCache[object, SideModel] = LRUCache(size_of=lambda model: model.memory)

    def get(
        self,
        path: Path,
        dtype: torch.dtype,
        *,
        limit: int = 1,
        room: float = float("inf"),
        storage: torch.dtype | None = None,
    ) -> SideModel:
        """Return a base; load it if necessary, and evict those unused for longest.

        At most ``limit`` bases stay, with at most ``room`` bytes of weights in total.  The requested one always stays.
        """
        state = FileState.of(path)
        key = state, dtype, storage
        model = self._models.get(key)
        if model is None:
            # Evict first: two bases at once may not fit.  A file's size is about the least that its model takes.
            self._evict(max_size=room - state.size, max_count=limit - 1, min_count=0)
            model = SideModel(path, dtype, storage)
            self._models.put(key, model)
        self._evict(max_size=room, max_count=limit)
        return model

    def clear(self) -> None:
        """Evict all models."""
        self._evict(max_size=0, max_count=0, min_count=0)

    def _evict(self, *, max_size: float, max_count: float, min_count: int = 1) -> None:
        evicted = self._models.evict(max_size=max_size, max_count=max_count, min_count=min_count)
        if evicted:
            self._on_evict(evicted)
            evicted.clear()
            gc.collect()  # else reference cycles would delay freeing them
            trim_heap()

    def __iter__(self) -> Iterator[SideModel]:
        return iter(self._models)


def user_error(error: BaseException, doing: str) -> DeltaError:
    """Turn any error while ``doing`` something into one for users."""
    if isinstance(error, DeltaError):
        return error
    if out_of_memory(error):
        return DeltaError(
            f"out of memory while {doing}: choose low-rank factors and fp16 in Settings > Delta Sampling, "
            "a smaller picture or batch, or the CPU as its device"
        )
    return DeltaError(f"{doing} failed ({type(error).__name__}: {error}): the console has the details")
