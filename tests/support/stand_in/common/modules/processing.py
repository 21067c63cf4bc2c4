"""A generation: the order in which the WebUI calls scripts, text encoder and sampler.  Pictures are latents here."""

from dataclasses import dataclass, field
from typing import Any

import torch

from modules import extra_networks, prompt_parser, script_callbacks, sd_models, sd_samplers, shared
from modules.processing_host import (
    apply_circular,
    negative_is_needed,
    parser_options,
    restore_model,
    sample,
    take_notes,
    without_gradients,
)


class ScriptRunner:
    """Calls the scripts' methods; the WebUI only prints an Exception of one."""

    def __init__(self, scripts):
        self.scripts = scripts

    def __getattr__(self, name):
        def call(p, *arguments, **named):
            for script in self.scripts:
                if hasattr(script, name):
                    try:
                        getattr(script, name)(p, *arguments, **named)
                    except Exception as error:
                        script_callbacks.swallowed.append(error)

        return call


@dataclass
class Processed:
    """The result of a generation: latents ``(N, 4, h, w)``, and an infotext for each."""

    images: torch.Tensor
    infotexts: list
    comments: list


@dataclass
class StableDiffusionProcessing:
    """A generation's settings and state."""

    prompt: Any = ""
    negative_prompt: str = ""
    steps: int = 3
    cfg_scale: float = 4.0
    sampler_name: str = "Euler"
    scheduler: Any = None
    tiling: Any = None
    hr_scheduler: Any = None
    batch_size: int = 1
    n_iter: int = 1
    seed: int = 3
    width: int = 64
    height: int = 64
    eta: Any = None
    s_churn: float = 0.0
    s_min_uncond: float = 0.0
    denoising_strength: float = 0.6
    scripts: Any = None
    script_args: list = field(default_factory=list)
    extra_generation_params: dict = field(default_factory=dict)
    comments: list = field(default_factory=list)
    is_hr_pass: bool = False
    sampler: Any = None

    sd_model = property(lambda self: shared.sd_model)

    def comment(self, text):
        self.comments.append(text)

    def get_token_merging_ratio(self, for_hr=False):
        ratio = shared.opts.token_merging_ratio
        return getattr(shared.opts, "token_merging_ratio_hr", 0) or ratio if for_hr else ratio

    def latent_size(self):
        return self.height // 8, self.width // 8

    def noise(self, size):
        torch.manual_seed(self.seeds[0])
        return torch.randn(self.batch_size, shared.sd_model.latent_channels, *size)

    def conds(self, prompts, negative, steps, hires_steps=None):
        limits = steps, hires_steps, *parser_options()
        cond = prompt_parser.get_multicond_learned_conditioning(shared.sd_model, prompts, *limits)
        uncond = None
        if negative_is_needed(self):
            uncond = prompt_parser.get_learned_conditioning(shared.sd_model, negative, *limits)
        take_notes(self)
        return cond, uncond

    def setup_prompts(self, number):
        of_batch = slice(number * self.batch_size, (number + 1) * self.batch_size)
        self.seeds = [self.seed + i for i in range(number * self.batch_size, (number + 1) * self.batch_size)]
        self.prompts = self.all_prompts[of_batch]
        self.negative_prompts = [self.negative_prompt] * self.batch_size
        self.iteration = number
        self.prompts, self.extra_network_data = extra_networks.parse_prompts(self.prompts)

    def before_every_sampling(self):
        if self.scripts is not None:
            self.scripts.process_before_every_sampling(self)


def decoded(samples):
    """Decode latents, between the passes of hires fix and after them, within ``p.sample``."""
    return samples


@dataclass
class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """From noise; hires fix adds a pass in another size."""

    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_sampler_name: Any = None
    hr_second_pass_steps: int = 0
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    hr_checkpoint_name: Any = None
    hr_cfg: float = 1.0

    hr_upscale_to_x: int = 0
    hr_upscale_to_y: int = 0

    def setup_prompts(self, number):
        super().setup_prompts(number)
        if self.enable_hr:
            self.hr_upscale_to_x, self.hr_upscale_to_y = (
                int(self.width * self.hr_scale),
                int(self.height * self.hr_scale),
            )
            prompts = [self.hr_prompt] * self.batch_size if self.hr_prompt else list(self.all_prompts)
            self.hr_prompts, self.hr_extra_network_data = extra_networks.parse_prompts(prompts[: self.batch_size])
            self.hr_negative_prompts = [self.hr_negative_prompt or self.negative_prompt] * self.batch_size

    def sample(self, conditioning, unconditional_conditioning, **about):
        self.sampler = sd_samplers.create_sampler(self.sampler_name)
        x = self.noise(self.latent_size())
        restore_model(self)
        self.before_every_sampling()
        samples = self.sampler.sample(self, x, conditioning, unconditional_conditioning)
        return self.sample_hr_pass(decoded(samples)) if self.enable_hr else samples

    def sample_hr_pass(self, samples):
        if self.hr_checkpoint_name:
            sd_models.reload_model_weights(sd_models.get_closet_checkpoint_match(self.hr_checkpoint_name))
        self.is_hr_pass = True
        self.sampler = sd_samplers.create_sampler(self.hr_sampler_name or self.sampler_name)
        size = [int(side * self.hr_scale) for side in self.latent_size()]
        samples = torch.nn.functional.interpolate(samples, size)
        steps = self.hr_second_pass_steps or self.steps
        first, second = (
            sd_samplers.find_sampler_config(name).total_steps(count)
            for name, count in ((self.sampler_name, self.steps), (self.hr_sampler_name or self.sampler_name, steps))
        )
        conds = self.conds(self.hr_prompts, self.hr_negative_prompts, first, second)
        self.before_every_sampling()
        if restore_model(self):
            self.before_every_sampling()
        samples = self.sampler.sample_img2img(self, samples, self.noise(size), *conds, steps=steps)
        self.sampler = None
        samples = decoded(samples)
        self.is_hr_pass = False
        return samples


@dataclass
class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """From a latent; a mask ``(4, h, w)`` may preserve a part of it."""

    init_latent: Any = None
    mask: Any = None
    nmask: Any = None

    def sample(self, conditioning, unconditional_conditioning, **about):
        if self.sampler is None:  # the same for all batches
            self.sampler = sd_samplers.create_sampler(self.sampler_name)
        noise = self.noise(self.latent_size())
        restore_model(self)
        self.before_every_sampling()
        samples = self.sampler.sample_img2img(self, self.init_latent, noise, conditioning, unconditional_conditioning)
        return samples if self.mask is None else samples * self.nmask + self.init_latent * self.mask


def create_infotext(p):
    """Return the infotext after the prompt; a value may be a function of the generation."""
    said = []
    for key, value in p.extra_generation_params.items():
        if callable(value):
            value = value(p=p)
        if value is not None:
            said.append(f"{key}: {value}")
    return ", ".join(said)


def process_images(p):
    """Generate; swallows scripts' errors, and raises those of sampling."""
    texts, pictures = [], []
    p.all_prompts = list(p.prompt) if isinstance(p.prompt, list) else [p.prompt] * (p.batch_size * p.n_iter)
    checkpoint = shared.sd_model.sd_checkpoint_info
    apply_circular(p.sd_model, bool(p.tiling))
    if p.scripts is not None:
        p.scripts.process(p, *p.script_args)
    with without_gradients():
        for number in range(p.n_iter):
            sd_models.reload_model_weights(checkpoint)
            p.setup_prompts(number)
            restore_model(p)
            extra_networks.activate(p, p.extra_network_data)
            if p.scripts is not None:
                p.scripts.process_batch(p)
            total = sd_samplers.find_sampler_config(p.sampler_name).total_steps(p.steps)
            p.c, p.uc = p.conds(p.prompts, p.negative_prompts, total)
            pictures.append(sample(p, conditioning=p.c, unconditional_conditioning=p.uc, seeds=p.seeds))
            for index, prompt in enumerate(p.all_prompts[number * p.batch_size : (number + 1) * p.batch_size]):
                p.batch_index = index
                if p.scripts is not None:
                    p.scripts.postprocess_image(p, pictures[-1][index])
                texts.append(f"{prompt}\nSteps: {p.steps}, {create_infotext(p)}")
    # Pictures that are already decoded are a list.
    made = Processed(pictures[0] if isinstance(pictures[0], list) else torch.cat(pictures), texts, p.comments)
    if p.scripts is not None:
        p.scripts.postprocess(p, made, *p.script_args)
    return made
