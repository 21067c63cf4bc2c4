"""Rebuild everything in ``demo/models`` from the emoji sets: ``python -m demo.train``.

Each stage runs in its own process, saves as it goes, and is skipped once the cache marks it as done.  So an interrupted
run resumes.  On a CPU every process has one thread, and independent stages run in parallel, one per core.

``--further`` starts from the existing models instead of from nothing: the autoencoder stays, base and target train on.
``--stage`` runs only one stage; an adapter then trains on the base in ``demo/models`` if the cache has none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from demo.train import adapters, bridges, controls, export, targets
from demo.train.common import Run
from demo.train.data import Emoji, load, pixelated
from demo.train.denoisers import (
    BASE,
    BASE_TEXT,
    TARGET,
    TARGET_TEXT,
    VARIANTS,
    Conditioned,
    latent_variants,
    load_conditioned,
    train_adapter,
    train_conditioned,
    train_full,
)
from demo.train.metrics import train_metrics
from demo.train.tokenizer import train_tokenizer
from demo.train.vae import CONFIG, train_decoder, train_vae
from demo.train.world import CONCEPTS, NAMES
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.loading import load_vae
from lib_delta.models.vae import VAE
from run import ONE_THREAD

MODELS = Path(__file__).parents[1] / "models"
RUNS = {
    "vae-colour": Run(steps=250, batch=16, rate=2e-3, warmup=50, average=0.97),
    "vae": Run(steps=900, batch=16, rate=2e-3, average=0.99),
    "vae-decoder": Run(steps=1000, batch=16, rate=1e-3, seed=10, average=0.99),
    "base-text": Run(steps=500, batch=48, rate=2e-3, warmup=50, seed=11, average=0.99),
    "base": Run(steps=9000, batch=32, rate=1e-3, seed=1),
    "target-text": Run(steps=500, batch=48, rate=2e-3, warmup=50, seed=12, average=0.99),
    "target": Run(steps=9000, batch=32, rate=1e-3, seed=2),
    "lineart": Run(steps=900, batch=24, rate=2e-3, warmup=50, seed=3, average=0.99),
    "lineart-loha": Run(steps=900, batch=24, rate=2e-3, warmup=50, seed=3, average=0.99),
    "lineart-lokr": Run(steps=900, batch=24, rate=3e-3, warmup=50, seed=3, average=0.99),
    "lineart-ia3": Run(steps=900, batch=24, rate=4e-2, warmup=50, seed=3, average=0.99),
    "lineart-oft": Run(steps=900, batch=24, rate=3e-3, warmup=50, seed=3, average=0.99),
    "lineart-seed2": Run(steps=900, batch=24, rate=2e-3, warmup=50, seed=8, average=0.99),
    "lineart-seed3": Run(steps=900, batch=24, rate=2e-3, warmup=50, seed=9, average=0.99),
    "lineart-full": Run(steps=900, batch=24, rate=5e-4, warmup=50, seed=4, average=0.99),
    "pixelart": Run(steps=900, batch=24, rate=2e-3, warmup=50, seed=5, average=0.99),
    "concepts": Run(steps=900, batch=24, rate=2e-3, warmup=50, seed=6, average=0.99),
    "edges": Run(steps=700, batch=24, rate=2e-3, warmup=50, seed=8, average=0.99),
    "image-prompt": Run(steps=2400, batch=24, rate=2e-3, warmup=50, seed=9, average=0.99),
    "metrics": Run(steps=4000, batch=48, rate=2e-3, seed=7),
}
# The same style by every algorithm of adapters, and by a LoRA from three seeds, whose differences are the noise that
# those of the algorithms are held against; the same algorithm for another style, and for names.
LINE_ART = {
    **dict.fromkeys(("lineart", "lineart-seed2", "lineart-seed3"), adapters.low_rank(adapters.LORA_RANK)),
    "lineart-loha": adapters.hadamard(adapters.LOHA_RANK),
    "lineart-lokr": adapters.kronecker(adapters.LOKR_FACTOR),
    "lineart-ia3": adapters.multiplied(),
    "lineart-oft": adapters.rotated(adapters.OFT_BLOCK),
}
LORAS = ("pixelart", "concepts")
ADAPTERS = {**LINE_ART, **dict.fromkeys(LORAS, adapters.low_rank(adapters.LORA_RANK))}
NEEDS: dict[str, tuple[str, ...]] = {
    "vae": (),
    "base": ("vae",),
    "target": ("vae",),
    "metrics": (),
    **dict.fromkeys((*ADAPTERS, "lineart-full", "edges", "image-prompt"), ("base",)),
    **targets.NEEDS,
}
# How many of a picture's variants are augmented strongly: base and adapted follow what is in front of them; the
# target keeps its colours and is moved less, but for a quarter, so that it too follows what it is shown.
STRONG = {"flat": VARIANTS // 2, "lineart": VARIANTS // 2, "noto": VARIANTS // 4}
CONCEPT_SHARE = 0.6  # of the pictures that teach new names; the others maintain the old ones


class Workshop:
    """The stages, which exchange their results through files in ``cache``."""

    def __init__(self, cache: Path, further: bool) -> None:
        self.cache, self.further = cache, further
        self.every: Emoji = load(cache)
        self.emoji, self.concepts = self.every.only(NAMES), self.every.only(CONCEPTS)
        tokenizer = MODELS / "tokenizer"
        if not (tokenizer / "vocab.json").exists():
            train_tokenizer([*NAMES, *CONCEPTS], tokenizer)
        self.tokens = _tokenise([*NAMES, ""], tokenizer)
        self.concept_tokens = _tokenise(CONCEPTS, tokenizer)
        # OpenCLIP, and so SD 2.x, pads with 0; CLIP repeats the end-of-text token.
        ended = (self.tokens == self.tokens.max()).cumsum(1) > 1
        self.open_clip_tokens = self.tokens.masked_fill(ended, 0)

    def run(self, stage: str) -> None:
        """Train one stage and write its file in ``demo/models``."""
        stages: dict[str, Callable[[], None]] = {
            "vae": self.vae,
            "base": self.base,
            "target": self.target,
            "lineart-full": self.full,
            "edges": self.edges,
            "image-prompt": self.image_prompt,
            "metrics": self.metrics,
            **{name: partial(self.adapter, name) for name in ADAPTERS},
            **self.targets().stages(),
        }
        stages[stage]()
        self._mark(stage).touch()

    def vae(self) -> None:
        if self.further:
            torch.save(self._landed_vae().state_dict(), self.cache / "vae.pt")
            return
        torch.manual_seed(RUNS["vae"].seed)
        vae = train_vae(self.every, self.cache, RUNS["vae-colour"], RUNS["vae"])
        shown = self.every.only([*NAMES, *CONCEPTS])
        torch.save(train_decoder(vae, shown, self.cache, RUNS["vae-decoder"]).state_dict(), self.cache / "vae.pt")

    def trained_vae(self) -> VAE:
        """Return the autoencoder of this cache, or that of the base in ``demo/models``."""
        stored = self.cache / "vae.pt"
        if not stored.exists():
            return self._landed_vae()
        vae = VAE(CONFIG)
        vae.load_state_dict(torch.load(stored, weights_only=True))
        return vae.requires_grad_(False)

    def _landed_vae(self) -> VAE:
        with WeightFile.open(MODELS / "base.safetensors") as file:
            return load_vae(file)

    def latents(self, name: str) -> Tensor:
        """Return the variants of a set of pictures."""
        stored = self.cache / f"latents-{name}.pt"
        return latent_variants(self.trained_vae(), self.emoji.pictures[name], STRONG[name], stored, seed=7)

    def base(self) -> None:
        latents, runs = self.latents("flat"), (RUNS["base-text"], RUNS["base"])
        model = train_conditioned(
            "base", BASE, BASE_TEXT, self.tokens, latents, "eps", self.cache, *runs, STRONG["flat"], self.start("base")
        )
        torch.save(model.state_dict(), self.cache / "base.pt")
        export.sd1(MODELS / "base.safetensors", model, self.trained_vae())

    def trained_base(self) -> Conditioned:
        """Return the base of this cache, or the one in ``demo/models``."""
        model, stored = Conditioned(BASE, BASE_TEXT, int(self.tokens.max()) + 1), self.cache / "base.pt"
        if stored.exists():
            model.load_state_dict(torch.load(stored, weights_only=True))
        else:
            load_conditioned(model, MODELS / "base.safetensors")
        return model

    def target(self) -> None:
        latents, runs = self.latents("noto"), (RUNS["target-text"], RUNS["target"])
        tokens, start = self.open_clip_tokens, self.start("target")
        model = train_conditioned(
            "target", TARGET, TARGET_TEXT, tokens, latents, "v", self.cache, *runs, STRONG["noto"], start
        )
        export.sd2(MODELS / "target.safetensors", model, self.trained_vae())

    def targets(self) -> targets.Bench:
        """Return the inputs of the stages for targets with other latents."""
        strong = STRONG["noto"]
        return targets.Bench(
            self.cache, MODELS, self.trained_vae, self.every, self.emoji, self.open_clip_tokens, strong
        )

    def adapter(self, stage: str) -> None:
        trained = train_adapter(
            stage, ADAPTERS[stage], self.trained_base(), *self.lesson(stage), self.cache, RUNS[stage]
        )
        export.adapter(MODELS / f"{stage}.safetensors", trained)

    def lesson(self, stage: str) -> tuple[Tensor, Tensor]:
        """Return an adapter's training data: tokens (the last are the empty prompt's) and latents."""
        if stage in LINE_ART:
            return self.tokens, self.latents("lineart")
        vae, strong = self.trained_vae(), STRONG["flat"]
        if stage == "pixelart":
            flat, stored = self.emoji.pictures["flat"], self.cache / "latents-pixelart.pt"
            latents = latent_variants(vae, flat, strong, stored, seed=7, look=pixelated)
            return self.tokens, latents
        known = self.latents("flat")
        new = latent_variants(vae, self.concepts.pictures["flat"], strong, self.cache / "latents-concepts.pt", seed=7)
        times = round(CONCEPT_SHARE / (1 - CONCEPT_SHARE) * len(known) / len(new))
        tokens = torch.cat([self.concept_tokens] * times + [self.tokens])
        return tokens, torch.cat([new] * times + [known])

    def full(self) -> None:
        model = train_full(self.trained_base(), self.tokens, self.latents("lineart"), self.cache, RUNS["lineart-full"])
        export.unet_only(MODELS / "lineart-full.safetensors", model)

    def edges(self) -> None:
        lesson = self.steered(controls.maps_of(self.shown()))
        export.edges(MODELS / "edges.safetensors", controls.train_edges("edges", lesson, self.cache, RUNS["edges"]))

    def image_prompt(self) -> None:
        # Only recoloured pictures: the prompt determines the original colours.
        lesson = self.steered(self.shown()).last(STRONG["flat"])
        trained = controls.train_image_prompt("image-prompt", lesson, self.cache, RUNS["image-prompt"])
        export.image_prompt(MODELS, trained)

    def shown(self) -> Tensor:
        """Return the pictures that the base's latents encode."""
        return controls.variants_of(self.emoji.pictures["flat"], STRONG["flat"], seed=7)

    def steered(self, shown: Tensor) -> controls.Lesson:
        """Return a control's training data: the base's latents, each with its map or reference."""
        return controls.Lesson(self.trained_base(), self.tokens, self.latents("flat"), shown)

    def metrics(self) -> None:
        judged = self.every.only([*NAMES, *CONCEPTS])
        # With the judge of content, in its order.
        for file, names in (("names.json", NAMES), ("concepts.json", CONCEPTS)):
            (MODELS / file).write_text(json.dumps(names, indent=0) + "\n", "utf-8")
        export.metrics(MODELS / "metrics.safetensors", train_metrics(judged, self.cache, RUNS["metrics"]))

    def start(self, stage: str) -> Path | None:
        """Return the checkpoint from which a stage continues."""
        return MODELS / f"{stage}.safetensors" if self.further else None

    def finished(self, stage: str) -> bool:
        return self._mark(stage).exists()

    def _mark(self, stage: str) -> Path:
        return self.cache / f"{stage}.done"


def _tokenise(prompts: list[str], folder: Path) -> Tensor:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    return torch.tensor(tokenizer(prompts, padding="max_length", max_length=77, truncation=True)["input_ids"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.train", description="Train the embedded models from the emoji sets.")
    parser.add_argument(
        "--cache", type=Path, default=Path("demo/train/cache"), help="where pictures, latents and saves are kept"
    )
    parser.add_argument("--further", action="store_true", help="start from the models that are there")
    parser.add_argument("--stage", choices=sorted((*NEEDS, "bridges")), help="run this stage alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="stages side by side")
    bridges.add_stage_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage == "bridges":
        # Its results belong to the extension, not to the embedded world.
        bridges.run(options, lambda: load(options.cache))
        return
    workshop = Workshop(options.cache, options.further)
    if options.stage:
        workshop.run(options.stage)
        return
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while todo := [stage for stage in NEEDS if not workshop.finished(stage)]:
            for stage in todo:
                ready = stage not in running and all(map(workshop.finished, NEEDS[stage]))
                if ready and len(running) < options.jobs:
                    command = [sys.executable, "-m", "demo.train", "--cache", str(options.cache), "--stage", stage]
                    command += ["--further"] if options.further else []
                    running[stage] = subprocess.Popen(command, env={**os.environ, **ONE_THREAD})
            time.sleep(1)
            for stage, process in list(running.items()):
                if process.poll() is not None:
                    del running[stage]
                    if process.returncode:
                        raise SystemExit(f"training of {stage} ended with status {process.returncode}")
    finally:
        for process in running.values():
            process.terminate()


if __name__ == "__main__":
    main()
