"""The rescale of the loaded model's schedule to zero terminal SNR, for one picture."""

from modules import shared


def rescaled(sigmas):
    """Shift and stretch the roots of the signal levels so that the last is (nearly) 0 (arXiv 2305.08891)."""
    roots = (1 / (sigmas**2 + 1)).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    levels = roots**2
    levels[-1] = 4.8973451890853435e-08
    return ((1 - levels) / levels).sqrt()


def sample(p, **conds):
    """Sample; restores the schedule afterwards, but not after an error."""
    predictor, before = p.sd_model.forge_objects.unet.model.predictor, None
    if shared.opts.sd_noise_schedule == "Zero Terminal SNR":
        before = predictor.sigmas
        predictor.set_sigmas(rescaled(before))
    samples = p.sample(**conds)
    if before is not None:
        predictor.set_sigmas(before)
    return samples
