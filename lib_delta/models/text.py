"""The text encoders of Stable Diffusion 1.x, 2.x and XL, with a checkpoint's weights.

CLIP-L (arXiv 2103.00020) has the key names of transformers, OpenCLIP-H and -G those of open_clip.  Both run as
transformers' CLIP text model.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from lib_delta.diffusion.families import Family
from lib_delta.errors import CheckpointError, DeltaError, SettingError
from lib_delta.files.weight_file import WeightFile, header_number
from lib_delta.models.loading import load_weights
from lib_delta.models.unet import timestep_embedding
from lib_delta.models.unpatched import unpatched

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# The prefixes of each family's encoders: CLIP in transformers' names (newer, then older files), then open_clip's.
CLIP_PREFIXES = {
    Family.SD1: ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    Family.SDXL: ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."),
}
OPEN_CLIP_PREFIXES = {Family.SD2: "cond_stage_model.model.", Family.SDXL: "conditioner.embedders.1.model."}
SIZE_WIDTH = 256


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text model's architecture, as its weights show it."""

    width: int
    inner_width: int
    layers: int
    positions: int
    vocabulary: int
    heads: int
    activation: Literal["quick_gelu", "gelu"]
    projection: int | None = None

    @classmethod
    def sd15(cls) -> TextConfig:
        """Return the configuration of Stable Diffusion 1.5's text encoder, CLIP-L."""
        return cls(
            width=768, inner_width=3072, layers=12, positions=77, vocabulary=49408, heads=12, activation="quick_gelu"
        )

    @classmethod
    def from_shapes(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        activation: Literal["quick_gelu", "gelu"],
        heads: int | None = None,
    ) -> TextConfig:
        """Return the configuration of weights with these shapes, in transformers' names below ``text_model.``.

        Without a number of ``heads``, heads are 64 wide.
        Raises ``KeyError`` that names a missing weight.
        """
        vocabulary, width = shapes["embeddings.token_embedding.weight"]
        heads = heads or max(1, width // 64)
        if width % heads:
            raise CheckpointError(
                f"a text encoder of width {width} cannot have {heads} heads: the width must be divisible"
            )
        return cls(
            width=width,
            inner_width=shapes["encoder.layers.0.mlp.fc1.weight"][0],
            layers=len({m[1] for k in shapes if (m := re.match(r"encoder\.layers\.(\d+)\.", k))}),
            positions=shapes["embeddings.position_embedding.weight"][0],
            vocabulary=vocabulary,
            heads=heads,
            activation=activation,
            projection=shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None,
        )


class TextEncoder(nn.Module):
    """One CLIP text model; ``transformer`` is transformers' module, with its key names.

    With ``final_norm``, the model's last norm is applied to the returned hidden state of any layer (in SD 1.x and 2.x,
    not in SDXL).
    """

    def __init__(self, config: TextConfig, final_norm: bool) -> None:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        super().__init__()
        self.config, self.final_norm = config, final_norm
        # This class has the same key names in every version of transformers; the plain text model does not.
        self.transformer = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=config.vocabulary,
                hidden_size=config.width,
                intermediate_size=config.inner_width,
                projection_dim=config.projection or config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                max_position_embeddings=config.positions,
                hidden_act=config.activation,
                bos_token_id=config.vocabulary - 2,
                eos_token_id=config.vocabulary - 1,
            )
        )
        if config.projection is None:
            del self.transformer.text_projection
        unpatched(self.transformer)

    def forward(self, tokens: Tensor, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """Encode ``(N, T)`` tokens.

        Args:
            tokens: token numbers; end-of-text is the vocabulary's last, as in every CLIP.
            clip_skip: the layer of the returned output, counted from the last, which is 1.

        Returns:
            The hidden state ``(N, T, width)`` and, for models with a projection, the pooled text ``(N, projection)``
            of the last layer; else None.
        """
        if not 1 <= clip_skip <= self.config.layers:
            raise SettingError(f"clip skip is {clip_skip}: 1 to {self.config.layers} is needed for this text encoder")
        model = self.transformer.text_model
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
        hidden = model.final_layer_norm(states[-clip_skip]) if self.final_norm else states[-clip_skip]
        if self.config.projection is None:
            return hidden, None
        end = tokens.eq(self.config.vocabulary - 1).int().argmax(-1)
        last = states[-1][torch.arange(len(tokens), device=tokens.device), end]
        return hidden, self.transformer.text_projection(model.final_layer_norm(last))

    def encode(self, tokens: Tensor, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """Encode as :meth:`forward` does."""
        encoded: tuple[Tensor, Tensor | None] = self(tokens, clip_skip)
        return encoded


def load_towers(
    file: WeightFile, family: Family, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[TextEncoder, ...]:
    """Build the text encoders of a checkpoint, in the order of their joined outputs.

    Raises :class:`CheckpointError` if one is missing or incomplete.
    """
    towers = []
    if family in CLIP_PREFIXES:
        towers.append(_tower(file, family, _clip_weights(file, family), dtype=dtype, device=device))
    if family in OPEN_CLIP_PREFIXES:
        towers.append(
            _tower(file, family, _open_clip_weights(file, family), activation="gelu", dtype=dtype, device=device)
        )
    return tuple(towers)


def _tower(
    file: WeightFile,
    family: Family,
    weights: Mapping[str, Tensor],
    *,
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
    dtype: torch.dtype,
    device: torch.device | str,
) -> TextEncoder:
    try:
        shapes = {k: tuple(v.shape) for k, v in weights.items()}
        config = TextConfig.from_shapes(shapes, activation, header_number(file, "delta.text_heads"))
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file.name} has no usable text encoder of {family.label} ({error}):"
            " a full checkpoint in LDM layout is needed"
        ) from error
    with torch.device("meta"):
        tower = TextEncoder(config, final_norm=family is not Family.SDXL)
    _place_position_ids(tower, device)
    renamed = {
        f"transformer.{'' if k.startswith('text_projection') else 'text_model.'}{k}": v for k, v in weights.items()
    }
    load_weights(tower, renamed, file.name, dtype=dtype, device=device)
    return tower


def _place_position_ids(tower: TextEncoder, device: torch.device | str) -> None:
    """Compute the one buffer that is not loaded; old files store it with a wrong dtype."""
    embeddings = tower.transformer.text_model.embeddings
    numbers = torch.arange(tower.config.positions, device=device)[None]
    embeddings.register_buffer("position_ids", numbers, persistent=False)


def _clip_weights(file: WeightFile, family: Family) -> dict[str, Tensor]:
    prefix = next((p for p in CLIP_PREFIXES[family] if f"{p}embeddings.token_embedding.weight" in file.shapes), None)
    if prefix is None:
        return {}
    weights = file.below(prefix)
    return weights.tensors(k for k in weights.keys if k.startswith(("embeddings.", "encoder.", "final_layer_norm.")))


_OPEN_CLIP_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def _open_clip_weights(file: WeightFile, family: Family) -> dict[str, Tensor]:
    """Return an open_clip text model's weights in transformers' names."""
    weights = file.below(OPEN_CLIP_PREFIXES[family])
    renamed: dict[str, Tensor] = {}
    for key in weights.keys:
        if key in _OPEN_CLIP_NAMES:
            renamed[_OPEN_CLIP_NAMES[key]] = weights.tensor(key)
        elif key == "text_projection" and family is Family.SDXL:
            renamed["text_projection.weight"] = weights.tensor(key).t().contiguous()
        elif m := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key):
            renamed |= _open_clip_layer_weight(f"encoder.layers.{m[1]}.", m[2], weights.tensor(key))
    return renamed


def _open_clip_layer_weight(layer: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {f"{layer}self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", tensor.chunk(3))}
    module, kind = name.rsplit(".", 1)
    return {f"{layer}{_OPEN_CLIP_LAYER_NAMES.get(module, module)}.{kind}": tensor}


class Tokenizer(Protocol):
    """The part of ``transformers.CLIPTokenizer`` that :class:`Conditioner` uses."""

    bos_token_id: int
    eos_token_id: int

    def __len__(self) -> int: ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]: ...


def load_tokenizer(folder: str | Path | None = None) -> CLIPTokenizer:
    """Load CLIP's tokenizer from a folder (``vocab.json``, ``merges.txt``); without a folder, the released models'.

    The released tokenizer is made from the vocabulary in the package ``clip`` (clip-anytorch on the package index).
    Raises :class:`DeltaError` if the files are missing.
    """
    if folder is None:
        return _released_tokenizer()
    vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
    if not (vocabulary.is_file() and merges.is_file()):
        raise DeltaError(f"{folder} holds no CLIP tokenizer: vocab.json and merges.txt are needed")
    return _tokenizer(vocabulary, merges)


def _tokenizer(vocabulary: Path, merges: Path) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    try:
        # Parsed here because the compiled tokenizer's errors have no class that could be caught.
        json.loads(vocabulary.read_text(encoding="utf-8"))
        return CLIPTokenizer(str(vocabulary), str(merges))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DeltaError(
            f"{vocabulary.parent} holds a damaged CLIP tokenizer ({error}): a whole one is needed"
        ) from error


def _released_tokenizer() -> CLIPTokenizer:
    """Build the tokenizer of the released CLIP models (arXiv 2103.00020, 2.4; byte-pair encoding).

    The vocabulary has the order of the original code: bytes, bytes that end a word, merges, marks.
    """
    with gzip.open(_vocabulary_file(), "rt", encoding="utf-8") as stream:
        lines = stream.read().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    letters = _byte_letters()
    entries = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}), encoding="utf-8")
        rules.write_text("\n".join([lines[0], *merges]), encoding="utf-8")
        return _tokenizer(vocabulary, rules)


def _vocabulary_file() -> Path:
    # Found without an import: the package imports torchvision, which is not needed here.
    spec = importlib.util.find_spec("clip")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder, "bpe_simple_vocab_16e6.txt.gz")
        if file.exists():
            return file
    raise DeltaError(
        "CLIP's vocabulary is not installed: install the package clip-anytorch, or name a tokenizer folder"
    )


def _byte_letters() -> list[str]:
    """Return a printable letter for each byte: first printable bytes as they are, then all others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@dataclass(frozen=True)
class TextConditioning:
    """Encoded prompts: ``context`` ``(N, T, C)`` and, for SDXL, the ``pooled`` text ``(N, P)``."""

    context: Tensor
    pooled: Tensor | None = None


class Conditioner:
    """Encodes prompts for a family's UNet.

    Prompts are cut into chunks of 75 tokens between start and end marks; all get as many chunks as the longest.  There
    is no emphasis grammar: hosts have theirs.
    """

    def __init__(self, family: Family, towers: Sequence[TextEncoder], tokenizer: Tokenizer) -> None:
        self.family, self.towers, self.tokenizer = family, tuple(towers), tokenizer
        for tower in self.towers:
            if len(tokenizer) != tower.config.vocabulary:
                raise CheckpointError(
                    f"the tokenizer has {len(tokenizer)} entries and the {family.label} text encoder"
                    f" {tower.config.vocabulary}: a tokenizer made for this checkpoint is needed"
                )

    @classmethod
    def load(
        cls,
        file: WeightFile,
        family: Family,
        tokenizer: Tokenizer,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Conditioner:
        """Load a checkpoint's text encoders."""
        return cls(family, load_towers(file, family, dtype, device), tokenizer)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], clip_skip: int = 1) -> TextConditioning:
        """Encode N prompts.

        ``clip_skip`` counts layers from the last, which is 1, and applies only to SD 1.x.  SD 2.x and XL were trained
        on the layer before the last, and always use it.
        """
        layer = clip_skip if self.family is Family.SD1 else 2
        encoded = [self._encode(tower, prompts, layer) for tower in self.towers]
        pooled = next((p for _, p in encoded if p is not None), None)
        return TextConditioning(torch.cat([hidden for hidden, _ in encoded], -1), pooled)

    def _encode(self, tower: TextEncoder, prompts: Sequence[str], layer: int) -> tuple[Tensor, Tensor | None]:
        chunks = self.chunks(prompts, tower)
        count = chunks.shape[1]
        hidden, pooled = tower.encode(chunks.flatten(0, 1), layer)
        joined = hidden.reshape(len(prompts), -1, hidden.shape[-1])
        return joined, None if pooled is None else pooled[::count]

    def chunks(self, prompts: Sequence[str], tower: TextEncoder) -> Tensor:
        """Return a text encoder's tokens ``(N, chunks, 77)``."""
        start, end, size = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, tower.config.positions - 2
        # CLIP was trained with end-of-text as padding, open_clip with 0.
        padding = end if tower.config.activation == "quick_gelu" else 0
        words = self.tokenizer(list(prompts), add_special_tokens=False, verbose=False)["input_ids"]
        count = max(1, *(-(-len(w) // size) for w in words))
        rows = []
        for tokens in words:
            parts = [tokens[i * size : (i + 1) * size] for i in range(count)]
            rows.append([[start, *part, end, *[padding] * (size - len(part))] for part in parts])
        return torch.tensor(rows, device=next(tower.parameters()).device)


def sdxl_label(
    pooled: Tensor,
    height: int,
    width: int,
    *,
    top: int = 0,
    left: int = 0,
    target_height: int | None = None,
    target_width: int | None = None,
) -> Tensor:
    """Join pooled text ``(N, P)`` with the embedded sizes (arXiv 2307.01952, 2.2) to ``(N, P + 6 * 256)``.

    Sizes are in picture pixels: of the original, of the crop's corner, and of the target (by default the original's).
    """
    sizes = (height, width, top, left, target_height or height, target_width or width)
    numbers = torch.tensor(sizes, dtype=torch.float32, device=pooled.device)
    embedded = timestep_embedding(numbers, SIZE_WIDTH).flatten().to(pooled.dtype)
    return torch.cat((pooled, embedded.expand(len(pooled), -1)), -1)
