"""Adapter files of random numbers, one of each format that users have, for the layers of an SD 1.x model.

Each changes its layers by a good share of their own weights, and holds fp32 numbers unless it says so:
AUTOMATIC1111 multiplies most formats' tensors as they are stored, which a CPU does not do in fp16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lib_delta.adapters.key_names import diffusers_paths
from lib_delta.diffusion.families import Family
from lib_delta.models.unet import UNet
from tests.support.webui.checkpoints import CLIP_WIDTH, RANK, Shape, Size, draw, text_shapes, write_tensors

PREFIX = "delta-test-format-"
STRENGTH = 0.6  # of a layer's own weights, in the mean square
BLOCK = 8  # entries that an OFT turns together

Tensors = dict[str, Tensor]


class Layer(NamedTuple):
    """A layer by its names: below ``lora_unet_`` or ``lora_te_`` in most files, in the checkpoint, and dotted."""

    name: str
    original: str
    dotted: str
    shape: Shape
    text: bool

    def noise(self, part: str, *shape: int) -> Tensor:
        """Return normal numbers, the same in every run and under every name."""
        return draw(f"{self.text} {self.name} {part}", shape)

    @property
    def inputs(self) -> int:
        """How many numbers make one output."""
        return prod(self.shape[1:])

    @property
    def ones(self) -> tuple[int, ...]:
        """A kernel of 1x1 where there is one."""
        return (1,) * len(self.shape[2:])


ATTENTION = r"attn[12]\.to_(q|k|v|out\.0)"
LINEAR = rf"{ATTENTION}|ff\.net\.(0\.proj|2)"
POINTS = r"proj_(in|out)"
KERNELS = r"resnets\.\d\.conv[12]|samplers\.0\.conv"
NORMS = r"norm[123]?"
TEXT = r"_proj|fc[12]"
# Where weights are stored whole, a part of the blocks makes files small.
SOME = r"(down_blocks\.1|up_blocks\.2)\.attentions\.0\."


def layers(size: Size, unet: str, text: str = "") -> list[Layer]:
    """Return the layers whose dotted names end in one of the patterns."""
    with torch.device("meta"):
        model = UNet(size.unets[Family.SD1])
    found = []
    for path, dotted in diffusers_paths(model).items():
        if re.search(rf"({unet})$", dotted):
            shape = tuple(model.get_submodule(path).weight.shape)
            found.append(Layer(dotted.replace(".", "_"), path, dotted, shape, False))
    for key, shape in text_shapes(CLIP_WIDTH, size.clip_layers, size.clip_inner).items():
        dotted = f"text_model.{key.removesuffix('.weight')}"
        if text and key.endswith(".weight") and re.search(rf"encoder\.layers\..*({text})$", dotted):
            found.append(Layer(dotted.replace(".", "_"), dotted, dotted, shape, True))
    return found


# What each algorithm stores for a layer.


def lora(layer: Layer, alpha: bool = True) -> Tensors:
    """LoRA and LoCon; alpha is half the rank."""
    down = layer.noise("down", RANK, *layer.shape[1:]) * layer.inputs**-0.5
    up = layer.noise("up", layer.shape[0], RANK, *layer.ones) * STRENGTH * RANK**-0.5
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    return {**tensors, "lora_up.weight": 2 * up, "alpha": torch.tensor(RANK / 2)} if alpha else tensors


def lora_as_matrices(layer: Layer) -> Tensors:
    return {name: tensor.flatten(1) if tensor.ndim else tensor for name, tensor in lora(layer).items()}


def lora_as_convolutions(layer: Layer) -> Tensors:
    return {name: tensor[..., None, None] if tensor.ndim else tensor for name, tensor in lora(layer).items()}


def locon_tucker(layer: Layer) -> Tensors:
    down = layer.noise("down", RANK, layer.shape[1], *layer.ones) * layer.inputs**-0.5
    up = layer.noise("up", layer.shape[0], RANK, *layer.ones) * 2 * STRENGTH
    core = layer.noise("mid", RANK, RANK, *layer.shape[2:]) / RANK
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": core}
    return {**tensors, "alpha": torch.tensor(RANK / 2)}


def loha(layer: Layer) -> Tensors:
    out, small = layer.shape[0], RANK**-0.5
    return {
        "hada_w1_a": layer.noise("1a", out, RANK),
        "hada_w1_b": layer.noise("1b", RANK, layer.inputs) * small,
        "hada_w2_a": layer.noise("2a", out, RANK) * 2 * STRENGTH,
        "hada_w2_b": layer.noise("2b", RANK, layer.inputs) * small * layer.inputs**-0.5,
        "alpha": torch.tensor(RANK / 2),
    }


def loha_tucker(layer: Layer) -> Tensors:
    out, inputs, *kernel = layer.shape
    return {
        "hada_t1": layer.noise("t1", RANK, RANK, *kernel) / RANK,
        "hada_w1_a": layer.noise("1a", RANK, out),
        "hada_w1_b": layer.noise("1b", RANK, inputs),
        "hada_t2": layer.noise("t2", RANK, RANK, *kernel) / RANK,
        "hada_w2_a": layer.noise("2a", RANK, out) * 2 * STRENGTH,
        "hada_w2_b": layer.noise("2b", RANK, inputs) * layer.inputs**-0.5,
        "alpha": torch.tensor(RANK / 2),
    }


def lokr(layer: Layer, first: bool, second: bool, core: bool = False) -> Tensors:
    """LoKr of a small first and a large second factor, each whole or of low rank."""
    out, inputs, *kernel = layer.shape
    large = (out // 4, inputs // 4)
    scale = STRENGTH * layer.inputs**-0.5
    tensors: Tensors = {}
    if first:
        tensors["lokr_w1"] = layer.noise("1", 4, 4)
    else:
        tensors["lokr_w1_a"] = layer.noise("1a", 4, RANK)
        tensors["lokr_w1_b"] = layer.noise("1b", RANK, 4) * RANK**-0.5
    if second:
        tensors["lokr_w2"] = layer.noise("2", *large, *kernel) * scale
    elif core:
        tensors["lokr_t2"] = layer.noise("t2", RANK, RANK, *kernel) / RANK
        tensors["lokr_w2_a"] = layer.noise("2a", RANK, large[0])
        tensors["lokr_w2_b"] = layer.noise("2b", RANK, large[1]) * scale
    else:
        tensors["lokr_w2_a"] = layer.noise("2a", large[0], RANK)
        tensors["lokr_w2_b"] = layer.noise("2b", RANK, large[1] * prod(kernel)) * scale * RANK**-0.5
    # Of two whole factors alpha says nothing.
    whole = first and second
    return {**tensors, "alpha": torch.tensor(0.25 if whole else 0.75 * RANK)}


def ia3(layer: Layer, on_input: bool) -> Tensors:
    side = layer.shape[1 if on_input else 0]
    shape = (1, side, *layer.ones) if layer.ones else (side,)
    return {"weight": layer.noise("weight", *shape) * STRENGTH, "on_input": torch.tensor(float(on_input))}


def glora(layer: Layer, first_version: bool = True) -> Tensors:
    """GLoRA: a map of the weight, ``(in, rank)`` times ``(rank, in)``, and a difference of low rank.

    In the first versions' files 1 and 2 are the other way round.
    """
    out, inputs = layer.shape
    scale = STRENGTH * (RANK * inputs) ** -0.5
    outer = layer.noise("a outer", inputs, RANK), layer.noise("b outer", out, RANK)
    inner = layer.noise("a inner", RANK, inputs) * scale, layer.noise("b inner", RANK, inputs) * scale
    one, two = ("2", "1") if first_version else ("1", "2")
    tensors = {f"a{one}.weight": outer[0], f"b{one}.weight": outer[1]}
    tensors |= {f"a{two}.weight": inner[0], f"b{two}.weight": inner[1]}
    return {**tensors, "alpha": torch.tensor(float(RANK))}


def norm(layer: Layer) -> Tensors:
    return {"w_norm": layer.noise("w", *layer.shape) * 0.4, "b_norm": layer.noise("b", *layer.shape) * 0.4}


def full(layer: Layer, bias: bool) -> Tensors:
    tensors = {"diff": layer.noise("diff", *layer.shape) * STRENGTH * layer.inputs**-0.5}
    return {**tensors, "diff_b": layer.noise("bias", layer.shape[0]) * 0.5} if bias else tensors


def oft(layer: Layer, constraint: float = 0.0, rescale: bool = False, butterfly: bool = False) -> Tensors:
    """OFT, or BOFT with four factors."""
    out = layer.shape[0]
    shape = (4, 8, out // 8, out // 8) if butterfly else (out // BLOCK, BLOCK, BLOCK)
    tensors = {"oft_blocks": layer.noise("blocks", *shape) * 0.6 * shape[-1] ** -0.5}
    tensors["alpha"] = torch.tensor(constraint)
    if rescale:
        tensors["rescale"] = 1 + 0.3 * layer.noise("rescale", out, 1, *layer.ones)
    return tensors


def oft_diag(layer: Layer) -> Tensors:
    """OFT of LyCORIS' first versions, whose files hold the matrices themselves."""
    turned = torch.eye(BLOCK) + 0.5 * BLOCK**-0.5 * layer.noise("diag", layer.shape[0] // BLOCK, BLOCK, BLOCK)
    return {"oft_diag": turned}


def dora(layer: Layer, inner: Callable[[Layer], Tensors]) -> Tensors:
    """DoRA whose magnitudes are those of inputs."""
    own = (layer.shape[0] / layer.shape[1]) ** 0.5
    scale = own * (1 + 0.3 * layer.noise("scale", 1, layer.shape[1], *layer.ones))
    return {**inner(layer), "dora_scale": scale}


# Files.


class Name(NamedTuple):
    """How a dialect calls layers and tensors."""

    layer: Callable[[Layer], str]
    tensors: Mapping[str, str] = {}


def kohya(unet: str = "lora_unet", text: str = "lora_te", original: bool = False, **tensors: str) -> Name:
    """Names with underscores; ``original``: those of the UNet's modules in the checkpoint."""

    def name(layer: Layer) -> str:
        below = layer.original.replace(".", "_") if original else layer.name
        return f"{text if layer.text else unet}_{below}"

    return Name(name, tensors)


def dotted(unet: str, text: str, down: str, up: str) -> Name:
    """diffusers' and peft's names."""
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    return Name(lambda layer: f"{text if layer.text else unet}{layer.dotted}", tensors)


KOHYA = kohya()


@dataclass(frozen=True)
class Format:
    """A file's algorithm, as the status calls it, the layers that it adapts, and how it names them."""

    algorithm: str
    make: Callable[[Layer], Tensors]
    unet: str
    text: str = TEXT
    name: Name = KOHYA
    dtype: torch.dtype = torch.float32
    ending: str = "safetensors"

    def layers(self, size: Size) -> list[Layer]:
        """Return the layers that it adapts."""
        return layers(size, self.unet, self.text)

    def tensors(self, size: Size) -> Tensors:
        """Return what its file holds."""
        return {
            f"{self.name.layer(layer)}.{self.name.tensors.get(part, part)}": tensor
            for layer in self.layers(size)
            for part, tensor in self.make(layer).items()
        }


LORA = Format(f"LoRA of rank {RANK}", lora, rf"{LINEAR}|{POINTS}|{KERNELS}")
OFT = Format("OFT", oft, rf"{ATTENTION}|{POINTS}")
LOKR = f"LoKr of rank {RANK}"
# Those that AUTOMATIC1111 1.10.1 reads as their trainers wrote them.  Left out is what it reads otherwise:
# - DoRA with magnitudes of outputs: it divides by the norms of inputs, whatever the file holds;
# - GLoRA with an alpha other than the rank: it takes no notice of alpha;
# - several networks at once that read the weights, see ``tests/webui/test_formats.py``;
# and what it does not read at all:
# - (IA)^3 on the outputs of convolutions, whose numbers it spreads over the kernel;
# - GLoRA on convolutions, and in the order of LyCORIS' later versions;
# - norms without a difference of the bias; the last norm of UNet and text encoder; embeddings of tokens;
# - on a CPU, fp16 in other formats than LoRA;
# - a bias for a layer that has none: it adds one, and its next generation with a network fails.
FORMATS: dict[str, Format] = {
    "lora": LORA,
    "lora-no-alpha": replace(LORA, make=partial(lora, alpha=False)),
    "lora-bf16": replace(LORA, dtype=torch.bfloat16),
    "lora-pt": replace(LORA, ending="pt"),
    "lora-matrices": replace(LORA, make=lora_as_matrices, unet=POINTS),
    "lora-convolutions": replace(LORA, make=lora_as_convolutions, unet=LINEAR),
    "lora-text-only": replace(LORA, unet="nothing"),
    "lora-unet-only": replace(LORA, text=""),
    "lora-outside": replace(
        LORA, unet=r"time_emb_proj|time_embedding\.linear_[12]|conv_shortcut|conv_in|conv_out", text=""
    ),
    "locon-tucker": Format(f"LoRA of rank {RANK}", locon_tucker, KERNELS, ""),
    "loha": Format(f"LoHa of rank {RANK}", loha, rf"{LINEAR}|{POINTS}|{KERNELS}"),
    "loha-tucker": Format(f"LoHa of rank {RANK}", loha_tucker, KERNELS, ""),
    "lokr-whole": Format(
        "LoKr", partial(lokr, first=True, second=True), rf"{SOME}.*({LINEAR}|{POINTS})", "self_attn.*"
    ),
    "lokr-second-low": Format(LOKR, partial(lokr, first=True, second=False), rf"{LINEAR}|{POINTS}|{KERNELS}"),
    "lokr-first-low": Format(LOKR, partial(lokr, first=False, second=True), rf"{SOME}.*({LINEAR}|{POINTS})", ""),
    "lokr-both-low": Format(LOKR, partial(lokr, first=False, second=False), rf"{LINEAR}|{POINTS}|{KERNELS}"),
    "lokr-tucker": Format(LOKR, partial(lokr, first=True, second=False, core=True), KERNELS, ""),
    "ia3-outputs": Format("(IA)^3", partial(ia3, on_input=False), LINEAR),
    "ia3-inputs": Format("(IA)^3", partial(ia3, on_input=True), rf"{LINEAR}|{POINTS}|{KERNELS}"),
    "glora": Format(f"GLoRA of rank {RANK}", glora, LINEAR),
    "norms": Format("Norm", norm, NORMS, "layer_norm[12]"),
    "full": Format(
        "Full", partial(full, bias=False), rf"{SOME}.*({ATTENTION}|{POINTS})", r"layers\.0\.self_attn\.[qv]_proj"
    ),
    "full-bias": Format("Full", partial(full, bias=True), rf"{SOME}.*(to_out\.0|{POINTS})", r"layers\.1.*fc1"),
    "oft": OFT,
    "oft-constraint": replace(OFT, make=partial(oft, constraint=0.02)),
    "oft-rescale": replace(OFT, make=partial(oft, rescale=True)),
    "oft-both": replace(OFT, make=partial(oft, constraint=0.02, rescale=True), unet=rf"{ATTENTION}|{POINTS}|{KERNELS}"),
    "oft-diag": replace(OFT, make=oft_diag),
    "boft": Format("BOFT", partial(oft, butterfly=True), rf"{SOME}.*({ATTENTION}|{POINTS})", ""),
    "boft-both": Format(
        "BOFT", partial(oft, butterfly=True, constraint=0.01, rescale=True), rf"{SOME}.*({ATTENTION}|{POINTS})", ""
    ),
    "dora-lora": Format(f"DoRA on LoRA of rank {RANK}", partial(dora, inner=lora), rf"{LINEAR}|{POINTS}|{KERNELS}"),
    "dora-loha": Format(f"DoRA on LoHa of rank {RANK}", partial(dora, inner=loha), rf"{LINEAR}|{POINTS}"),
    "dora-lokr": Format(
        f"DoRA on LoKr of rank {RANK}", partial(dora, inner=partial(lokr, first=True, second=False)), LINEAR
    ),
    "ldm-names": replace(LORA, name=kohya(original=True)),
    "te1": replace(LORA, name=kohya(text="lora_te1")),
    "lora-a-b": replace(
        LORA,
        make=partial(lora, alpha=False),
        name=kohya(**{"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}),
    ),
    "kohya-oft": replace(OFT, text="", name=kohya("oft_unet", original=True)),
}
# Dialects that AUTOMATIC1111 does not read for SD 1.x, each with the format that it is another spelling of.
DIALECTS: dict[str, tuple[str, Format]] = {
    "lycoris": ("lora", replace(LORA, name=kohya("lycoris_unet", "lycoris_te"))),
    "lycoris-loha": ("loha", replace(FORMATS["loha"], name=kohya("lycoris_unet", "lycoris_te"))),
    "diffusers": (
        "lora-no-alpha",
        replace(
            LORA,
            make=partial(lora, alpha=False),
            name=dotted("unet.", "text_encoder.", "lora_A.weight", "lora_B.weight"),
        ),
    ),
    "diffusers-old": (
        "lora-no-alpha",
        replace(
            LORA,
            make=partial(lora, alpha=False),
            name=dotted("unet.", "text_encoder.", "lora.down.weight", "lora.up.weight"),
        ),
    ),
    "peft": (
        "lora-unet-only-no-alpha",
        replace(
            LORA,
            make=partial(lora, alpha=False),
            text="",
            name=dotted("base_model.model.", "", "lora_A.default.weight", "lora_B.default.weight"),
        ),
    ),
    "glora-later": ("glora", replace(FORMATS["glora"], make=partial(glora, first_version=False))),
    "kohya-oft-diffusers": ("kohya-oft", replace(OFT, text="", name=kohya("oft_unet"))),
}
FORMATS["lora-unet-only-no-alpha"] = replace(LORA, make=partial(lora, alpha=False), text="")


def write(path: Path, tensors: Tensors, dtype: torch.dtype = torch.float32) -> None:
    """Write a file anew, so that it is what this module says."""
    part = path.with_suffix(".part")
    if path.suffix == ".pt":
        torch.save({key: tensor.to(dtype) for key, tensor in tensors.items()}, part)
    else:
        write_tensors(part, tensors, dtype=dtype)
    part.replace(path)


def make_formats(folder: Path, size: Size) -> None:
    """Put a file of each format and dialect into a WebUI's folder of LoRAs."""
    for name, form in (*FORMATS.items(), *((name, form) for name, (_, form) in DIALECTS.items())):
        write(folder / f"{PREFIX}{name}.{form.ending}", form.tensors(size), form.dtype)


def blocks_of(keys: Iterable[str]) -> dict[str, str]:
    """Tell in which block a file's keys are, by the checkpoint's own names; ``BASE`` is the text encoder."""
    short = {"input_blocks_": "IN", "output_blocks_": "OUT"}
    found = {}
    for key in keys:
        block = re.match(r"lora_unet_(input_blocks_|output_blocks_)(\d+)_", key)
        if block:
            found[key] = f"{short[block[1]]}{int(block[2]):02}"
        else:
            found[key] = "M00" if "_middle_block_" in key else "BASE" if key.startswith("lora_te") else ""
    return found
