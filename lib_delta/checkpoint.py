"""Reading checkpoints: what a model file is, and its UNet and autoencoder as modules.

Formats: safetensors and PyTorch's own files, both read by :mod:`lib_delta.formats` (so that no code in them can
run), in the key names of the original Stable Diffusion release, "LDM layout".
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from lib_delta.errors import CheckpointError, shown
from lib_delta.families import SERVED, Family
from lib_delta.formats import beside, zip_records
from lib_delta.formats.beside import ModelConfig
from lib_delta.formats.reading import Shapes
from lib_delta.formats.safetensors_file import SafetensorsReader
from lib_delta.formats.torch_file import TorchFileReader
from lib_delta.kinds import other_kind
from lib_delta.models import unet, vae
from lib_delta.models.unet import UNet, UNetConfig
from lib_delta.models.vae import VAE, VAEConfig
from lib_delta.parameterization import Prediction

Module = TypeVar("Module", bound=nn.Module)
# One thread copies out of the page cache at a fraction of what memory can do, and more than four gain little.
READERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class FileState:
    """A file, and what lies beside it and tells of it, as they were when it was read.

    Another time or size of any of them means another file.
    """

    path: Path
    modified: int
    size: int
    beside: beside.State = ()

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Look at a file; raises :class:`CheckpointError` if it cannot be."""
        try:
            found = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}): a model file is needed") from error
        return cls(path, found.st_mtime_ns, found.st_size, beside.state(path))


# ``DataParallel`` puts it before every key.
_WRAPPER = "module."


class Reader(Protocol):
    """The tensors of an open file."""

    metadata: Mapping[str, str]
    shapes: Shapes

    def tensor(self, key: str) -> Tensor: ...

    def close(self) -> None: ...


def _open(path: Path) -> Reader:
    """Choose the reader by the file's content, for names are often wrong."""
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): a model file is needed") from error
    if start[8:9] == b"{":
        return SafetensorsReader(path)
    if start.startswith((zip_records.START, b"\x80")):
        return TorchFileReader(path)
    raise CheckpointError(f"{path.name} {_what_it_is(start)}: a model file (.safetensors, .ckpt or .pt) is needed")


def _what_it_is(start: bytes) -> str:
    if not start:
        return "is empty"
    if start.startswith(b"GGUF"):
        return "is a quantised GGUF file"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the model itself"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page that was saved in place of a download"
    return "is not a model file"


class WeightFile:
    """An open model file, or the part of one below a prefix.

    Tensors are read when asked for, and stay what they are whatever becomes of the file.
    Raises :class:`CheckpointError` for files that are unreadable, damaged or of another format.
    """

    def __init__(self, reader: Reader, path: Path, prefix: str = "") -> None:
        self._reader, self.path, self.prefix = reader, path, prefix
        # A name that all models of diffusers have would tell nobody which one is meant.
        self.name = f"{beside.known_as(path)}/{path.name}" if beside.named_by_diffusers(path) else path.name

    @classmethod
    def open(cls, path: str | Path) -> WeightFile:
        """Open a ``.safetensors``, ``.ckpt`` or ``.pt`` file."""
        path = Path(path)
        reader = _open(path)
        # Models that were trained in parallel may be saved with the wrapper that they were in.
        wrapped = bool(reader.shapes) and all(key.startswith(_WRAPPER) for key in reader.shapes)
        return cls(reader, path, _WRAPPER if wrapped else "")

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's text fields (safetensors only)."""
        return self._reader.metadata

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes of the tensors by key, without the prefix."""
        start = len(self.prefix)
        return {k[start:]: v for k, v in self._reader.shapes.items() if k.startswith(self.prefix)}

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, without the prefix."""
        return tuple(self.shapes)

    def tensor(self, key: str) -> Tensor:
        """Return one tensor as it is stored."""
        try:
            return self._reader.tensor(self.prefix + key)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"{self.name} has no readable weight {self.prefix}{key} ({error})") from error

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return several tensors as they are stored, read by several threads."""
        keys = tuple(keys)
        with ThreadPoolExecutor(READERS) as readers:
            return dict(zip(keys, readers.map(self.tensor, keys)))

    def below(self, prefix: str) -> WeightFile:
        """Return a view of the keys that start with ``prefix``, with it removed."""
        return WeightFile(self._reader, self.path, self.prefix + prefix)

    def close(self) -> None:
        """Let go of the file; tensors that were read from it stay valid."""
        self._reader.close()

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Where the UNet may be: in a checkpoint, and in two forms of UNet-only files.
UNET_PREFIXES = (unet.PREFIX, "diffusion_model.", "")
TEXT_PREFIXES = ("cond_stage_model.", "conditioner.embedders.")

_OTHER_FILES: tuple[tuple[str, str], ...] = (
    (r"lora_(unet|te\d?|transformer)_|.*\.(lora_(down|up|A|B)|hada_w1_[ab]|lokr_w[12])", "a LoRA, not a checkpoint"),
    (r"control_model\.|input_hint_block\.|controlnet_cond_embedding\.|controlnet_", "a ControlNet, not a checkpoint"),
    (r"emb_params$|string_to_param|clip_[lg]$", "a textual inversion embedding, not a checkpoint"),
    (
        r"(unet\.)?down_blocks\.\d+\.(resnets|attentions)\.",
        "a UNet in diffusers layout, which diffusers' convert_diffusers_to_original_*.py turns into a checkpoint",
    ),
    (r"module\.", "saved from parallel training, in part: its keys start with 'module.', and ordinary ones are needed"),
    (r"model_ema\.", "a checkpoint with only the averaged (EMA) copy of its UNet: export it with its ordinary weights"),
    (
        r"(model\.)?diffusion_model\.",
        "incomplete or of a family that is not known: its UNet has no input_blocks.0.0.weight",
    ),
    (r"cond_stage_model\.|conditioner\.", "a checkpoint without a UNet"),
    (r"(first_stage_model\.)?(encoder|decoder)\.conv_in\.", "an autoencoder (VAE), not a checkpoint"),
    (r"(.*\.)?text_model\.", "a text encoder, not a checkpoint"),
)


def unet_prefix(shapes: Shapes) -> str | None:
    """Return the prefix of the UNet's keys, None where there is no UNet in LDM layout."""
    return next((p for p in UNET_PREFIXES if f"{p}input_blocks.0.0.weight" in shapes), None)


def detect_family(shapes: Shapes, name: str = "the file") -> Family:
    """Tell the family of a checkpoint from the shapes of all its weights.

    SD 1.x and 2.x differ in the projections of their attention blocks (convolutions, linear maps),
    SDXL has a label embedding besides; widths are not looked at, but to tell what shares all that.
    Raises :class:`CheckpointError` that names what the file is instead.
    """
    if any(".joint_blocks." in k or k.startswith("joint_blocks.") for k in shapes):
        return Family.SD3
    if any(".double_blocks." in k or k.startswith("double_blocks.") for k in shapes):
        return Family.FLUX
    prefix = unet_prefix(shapes)
    if prefix is None or any(k.startswith(("control_model.", "input_hint_block.")) for k in shapes):
        raise CheckpointError(f"{name} is {_other_file(shapes)} (needed: a checkpoint of {SERVED})")
    projection = next((v for k, v in shapes.items() if k.startswith(prefix) and k.endswith(".proj_in.weight")), ())
    if f"{prefix}label_emb.0.0.weight" not in shapes:
        return Family.SD2 if len(projection) == 2 else Family.SD1
    return _labelled_family(shapes, prefix)


def _labelled_family(shapes: Shapes, prefix: str) -> Family:
    context = next((v[-1] for k, v in shapes.items() if k.startswith(prefix) and k.endswith("attn2.to_k.weight")), 0)
    if context == Family.UNCLIP.context_width or any(k.startswith("cond_stage_model.") for k in shapes):
        return Family.UNCLIP
    # The refiner has one text encoder, OpenCLIP-G, where the base model has CLIP-L.
    if context == Family.SDXL_REFINER.context_width or any(
        k.startswith("conditioner.embedders.0.model.") for k in shapes
    ):
        return Family.SDXL_REFINER
    return Family.SDXL


def _other_file(shapes: Shapes) -> str:
    if kind := other_kind(shapes):
        return f"{kind}, not a checkpoint"
    for pattern, what in _OTHER_FILES:
        if any(re.match(pattern, key) for key in shapes):
            return what
    return "not a Stable Diffusion checkpoint" if shapes else "a file without any weights"


def detect_variant(shapes: Shapes) -> str:
    """Name what the UNet's input channels tell: "standard", "inpainting", "edit" or "depth"."""
    channels = shapes[f"{unet_prefix(shapes)}input_blocks.0.0.weight"][1]
    return {5: "depth", 8: "edit", 9: "inpainting"}.get(channels, "standard")


def detect_prediction(file: WeightFile, family: Family) -> Prediction:
    """Tell what the UNet predicts.

    In this order: what :func:`stated_prediction` finds; eps where a ``.yaml`` lies beside the file and says nothing of
    it, as ldm's models have it; else v for SD 2.x and eps for all others.  SD 2.x comes as 512 (eps) and
    768-v models of the same shapes: the default is that of the 768-v models, but for the inpainting and depth
    models, which are eps.  Where that is wrong the user has to say so.
    """
    stated = stated_prediction(file)
    if stated is not None:
        return stated
    standard_sd2 = family is Family.SD2 and detect_variant(file.shapes) == "standard"
    return "v" if standard_sd2 and ModelConfig.beside(file.path) is None else "eps"


def stated_prediction(file: WeightFile) -> Prediction | None:
    """Return what is said of what a file's UNet predicts, None where nothing is.

    In this order: the ``.yaml`` of its name beside it, which WebUIs believe first; an (empty) tensor ``v_pred``; the
    header's ``modelspec.prediction_type``, or a ``modelspec.architecture`` that ends in ``-v`` (as in
    ``stable-diffusion-v2-768-v``).
    Raises :class:`CheckpointError` for a configuration that cannot be read, and a prediction that is not served.
    """
    config = ModelConfig.beside(file.path)
    if config is not None and (configured := _configured_prediction(file.name, config)) is not None:
        return configured
    if "v_pred" in file.shapes:
        return "v"
    stated = file.metadata.get("modelspec.prediction_type", "").lower()
    if stated:
        if stated not in ("eps", "epsilon", "v", "v_prediction"):
            raise CheckpointError(f"{file.name} predicts {stated!r}, which is not served: eps or v is needed")
        return "v" if stated.startswith("v") else "eps"
    if file.metadata.get("modelspec.architecture", "").endswith("-v"):
        return "v"
    return None


def _configured_prediction(name: str, config: ModelConfig) -> Prediction | None:
    """Read ldm's name for a prediction, and sgm's."""
    scaling = config.text("denoiser_config", "params", "scaling_config", "target").rpartition(".")[2]
    stated = config.text("parameterization") or {"VScaling": "v", "EpsScaling": "eps"}.get(scaling, "")
    if stated and stated not in ("eps", "v"):
        raise CheckpointError(
            f"{name} predicts {shown(stated, 40)}, as {config.name} says, which is not served: eps or v is needed"
        )
    return cast("Prediction | None", stated or None)


def detect_zero_terminal_snr(file: WeightFile) -> bool:
    """Tell whether the noise schedule was rescaled to end in pure noise (arXiv 2305.08891)."""
    return "ztsnr" in file.shapes or file.metadata.get("ss_zero_terminal_snr", "").lower() == "true"


@dataclass(frozen=True)
class Report:
    """What a checkpoint is and what of it was used.

    ``missing`` names the parts that the file lacks (a UNet-only file has no text encoder or
    autoencoder); ``unexpected`` the keys that no part of a checkpoint of this family has.
    """

    family: Family
    variant: str
    prediction: Prediction
    zero_terminal_snr: bool
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


# Entries that training left behind: noise schedules, averaged weights, counters, flags read above.
_KNOWN_EXTRAS = re.compile(
    r"model_ema\.|(alphas_cumprod(_prev)?|betas|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|logvar|lvlb_weights"
    r"|scale_factor|v_pred|ztsnr|denoiser\.sigmas|depth_model\..*|embedding_manager\..*)$"
)


def _missing_parts(shapes: Shapes) -> tuple[str, ...]:
    parts = {"text encoder": TEXT_PREFIXES, "autoencoder": (vae.PREFIX,)}
    return tuple(part for part, prefixes in parts.items() if not any(k.startswith(prefixes) for k in shapes))


def _unexpected_keys(shapes: Shapes, prefix: str, known: Iterable[str]) -> tuple[str, ...]:
    known = {prefix + k for k in known}
    if not prefix:
        return tuple(k for k in shapes if k not in known)
    parts = (*TEXT_PREFIXES, vae.PREFIX)
    return tuple(k for k in shapes if k not in known and not k.startswith(parts) and not _KNOWN_EXTRAS.match(k))


@dataclass(frozen=True)
class Description:
    """What the header of a checkpoint tells of it, with nothing built; ``missing`` as in :class:`Report`."""

    name: str
    family: Family
    variant: str
    prediction: Prediction
    missing: tuple[str, ...]

    @property
    def unfit(self) -> str:
        """Why it cannot be the base of the side model, in a sentence; empty where it can."""
        if self.family is not Family.SD1:
            label = self.family.label
            return f"{self.name} is a model of {label}, and the base of Delta Sampling has to be an SD 1.x checkpoint"
        if self.variant != "standard":
            return f"{self.name} is an {self.variant} model: an ordinary SD 1.x checkpoint is needed as base"
        if "text encoder" in self.missing:
            return f"{self.name} has no text encoder: a whole SD 1.x checkpoint is needed as base"
        return ""


def describe(path: str | Path) -> Description:
    """Say what a checkpoint is, from its header alone: milliseconds, and remembered until the file changes.

    For lists of files, and to refuse before anything is built: ``describe(path).unfit`` is why a checkpoint cannot be
    the base, empty where it can.  Raises :class:`CheckpointError` for what is no checkpoint or cannot be read; see
    :func:`base_fault` for one sentence in every case.
    """
    described = _described(FileState.of(Path(path)))
    if isinstance(described, str):
        raise CheckpointError(described)
    return described


def base_fault(path: str | Path) -> str:
    """Return why a file cannot be the base of the side model, in a sentence; empty where it can.  Never raises."""
    try:
        return describe(path).unfit
    except CheckpointError as error:
        return str(error)


@functools.lru_cache(maxsize=4096)
def _described(state: FileState) -> Description | str:
    """Return the description, or the sentence that says why there is none: both are worth remembering."""
    try:
        with WeightFile.open(state.path) as file:
            family = detect_family(file.shapes, file.name)
            has_unet = unet_prefix(file.shapes) is not None
            return Description(
                name=file.name,
                family=family,
                variant=detect_variant(file.shapes) if has_unet else "standard",
                prediction=detect_prediction(file, family) if has_unet else "eps",
                missing=_missing_parts(file.shapes),
            )
    except CheckpointError as error:
        return str(error)


def load_unet(
    file: WeightFile,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prediction: Prediction | None = None,
) -> tuple[UNet, Report]:
    """Build the UNet of a checkpoint (or UNet-only file) and say what the file is.

    ``prediction`` overrides :func:`detect_prediction`, whose default for SD 2.x is a guess.
    Raises :class:`CheckpointError` for files of another kind or family, and for missing weights.
    """
    family = detect_family(file.shapes, file.name)
    if not family.served:
        raise CheckpointError(
            f"{file.name} is a model of {family.label}, which is not served: one of {SERVED} is needed"
        )
    prefix = unet_prefix(file.shapes) or ""
    weights = file.below(prefix)
    _refuse_unusable(weights)
    config = _unet_config(weights)
    module = build(lambda: UNet(config), weights, dtype, device)
    report = Report(
        family=family,
        variant=detect_variant(file.shapes),
        prediction=prediction or detect_prediction(file, family),
        zero_terminal_snr=detect_zero_terminal_snr(file),
        missing=_missing_parts(file.shapes),
        unexpected=_unexpected_keys(file.shapes, prefix, module.state_dict()),
    )
    return module, report


def _unet_config(weights: WeightFile) -> UNetConfig:
    try:
        return UNetConfig.from_shapes(weights.shapes, header_number(weights, "delta.head_width"))
    except CheckpointError as error:
        raise CheckpointError(f"{weights.name} cannot be used: {error}") from error


def load_vae(file: WeightFile, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> VAE:
    """Build the autoencoder of a checkpoint or of a file with nothing else.

    Raises :class:`CheckpointError` where the file has none.
    """
    prefix = next((p for p in (vae.PREFIX, "") if f"{p}encoder.conv_in.weight" in file.shapes), None)
    if prefix is None:
        raise CheckpointError(
            f"{file.name} has no autoencoder: a full checkpoint or a VAE file in LDM layout is needed"
        )
    weights = file.below(prefix)
    _refuse_unusable(weights)
    try:
        config = VAEConfig.from_shapes(weights.shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{file.name} cannot be used: {error}") from error
    return build(lambda: VAE(config), weights, dtype, device)


def header_number(file: WeightFile, key: str) -> int | None:
    """Return a positive whole number from the file's header, None where it is not there."""
    text = file.metadata.get(key)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise CheckpointError(f"{file.name} has {key} = {text!r} in its header: a positive whole number is needed")
    return int(text)


def _refuse_unusable(weights: WeightFile) -> None:
    """Refuse weights whose stored numbers need more than a change of type, or that are empty."""
    for key, shape in weights.shapes.items():
        if key.endswith((".scale_weight", ".scale_input", ".absmax", ".quant_map")) or "quant_state" in key:
            raise CheckpointError(
                f"{weights.name} is quantised ({key}): an fp32, fp16, bf16 or plain fp8 file is needed"
            )
        if 0 in shape:
            raise CheckpointError(f"{weights.name} is damaged: its weight {key} is empty, with shape {shape}")


def build(make: Callable[[], Module], weights: WeightFile, dtype: torch.dtype, device: torch.device | str) -> Module:
    """Make a module with a file's weights, without giving it any of its own first.

    Raises :class:`CheckpointError` that names the first weight that is missing or of another shape.
    """
    with torch.device("meta"):
        module = make()
    fill(module, weights.tensors(k for k in module.state_dict() if k in weights.shapes), weights.name, dtype, device)
    return module


def fill(
    module: nn.Module, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Give a module on the meta device its weights, which are not copied where type and device fit."""
    needed = module.state_dict()
    missing = [k for k in needed if k not in tensors]
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of {len(needed)} weights of its {type(module).__name__}"
            f" (the first is {missing[0]}): a complete checkpoint is needed"
        )
    state = {k: _fit(tensors[k], k, tuple(v.shape), name).to(device, dtype) for k, v in needed.items()}
    module.load_state_dict(state, assign=True)
    module.eval().requires_grad_(False)


def _fit(tensor: Tensor, key: str, shape: tuple[int, ...], name: str) -> Tensor:
    """Return the tensor in the shape that is needed; a 1x1 convolution may be stored as a matrix or the reverse."""
    found = tuple(tensor.shape)
    if found != shape and _without_ones(found) != _without_ones(shape):
        raise CheckpointError(
            f"{name} has weight {key} with shape {found} where {shape} is needed: the file is damaged"
        )
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} has weight {key} of type {tensor.dtype}: floating-point weights are needed")
    return torch.reshape(tensor, shape)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
