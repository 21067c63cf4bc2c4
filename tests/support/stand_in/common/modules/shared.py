"""The WebUI's global state."""

from types import SimpleNamespace

DEFAULTS = {
    "CLIP_stop_at_last_layers": 1,
    "batch_cond_uncond": True,
    "emphasis": "Original",
    "img2img_fix_steps": False,
    "live_preview_content": "Combined",
    "pad_cond_uncond": False,
    "pad_cond_uncond_v0": False,
    "s_min_uncond_all": False,
    "sd_noise_schedule": "Default",
    "skip_early_cond": 0.0,
    "token_merging_ratio": 0.0,
    "use_old_scheduling": False,
}

opts = SimpleNamespace(**DEFAULTS)
state = SimpleNamespace(
    interrupted=False, skipped=False, textinfo=None, sampling_step=0, sampling_steps=0, current_latent=None
)
sd_model = None
