"""The list of samplers."""

from modules import sd_samplers_kdiffusion, sd_samplers_timesteps

all_samplers_map = {data.name: data for data in (*sd_samplers_kdiffusion.samplers, *sd_samplers_timesteps.samplers)}


def find_sampler_config(name):
    return all_samplers_map.get(name)


def create_sampler(name):
    config = find_sampler_config(name)
    sampler = config.constructor()
    sampler.config = config
    return sampler
