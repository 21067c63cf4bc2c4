"""Tags of the form ``<name:argument:argument>`` in prompts."""

import re
from collections import defaultdict

registry = {}


class ExtraNetworkParams:
    """One tag's arguments."""

    def __init__(self, items):
        self.items = items


class ExtraNetwork:
    """A kind of tag."""

    def __init__(self, name):
        self.name = name


def register_extra_network(network):
    registry[network.name] = network


def parse_prompts(prompts):
    """Return the prompts without tags, and only the first prompt's tags, by name."""
    found = []
    cleaned = []
    for prompt in prompts:
        tags = defaultdict(list)

        def take(match, tags=tags):
            tags[match[1]].append(ExtraNetworkParams(match[2].split(":")))
            return ""

        cleaned.append(re.sub(r"<(\w+):([^>]+)>", take, prompt))
        found.append(tags)
    return cleaned, found[0] if found else None


def activate(p, data):
    for name, network in registry.items():
        network.activate(p, (data or {}).get(name, []))
