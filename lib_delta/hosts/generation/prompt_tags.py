"""``<delta:NAME:lambda>`` in the prompts of a batch, which count as AUTOMATIC1111's ``<lora:...>`` do.

The first prompt's count for all pictures of the batch, those of the first hires prompt in the hires pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib_delta.request.passes import Passes
from lib_delta.request.request import Request

TAG = "delta"
_WRITTEN = re.compile(rf"<{TAG}:[^>]+>")
RequestOfTags = Callable[[list[list[str]]], Request]


def passes_of(p: Any, read: RequestOfTags) -> Passes:
    """Return what the passes of a batch ask for; ``read`` makes a request of a prompt's tags."""
    first = _tags(getattr(p, "extra_network_data", None))
    hires = _tags(getattr(p, "hr_extra_network_data", None)) if getattr(p, "enable_hr", False) else first
    asked = read(first)
    return Passes(asked, asked if hires == first else read(hires))


def _tags(data: Mapping[str, Sequence[Any]] | None) -> list[list[str]]:
    return [[str(item) for item in params.items] for params in (data or {}).get(TAG, [])]


def without_tags(prompt: str) -> str:
    """Return a prompt without our tags."""
    return _WRITTEN.sub("", prompt)


def drop_ignored_tags(p: Any, number: int) -> list[str]:
    """Take out tags that no picture of batch ``number`` follows, and return the sentences that say so.

    In negative prompts, where they would be encoded as words; and from the texts of pictures that got the
    tags of another one, so that these do not claim them.
    """
    said = []
    for name in ("negative_prompts", "hr_negative_prompts"):
        prompts = getattr(p, name, None) or []
        if any(map(_WRITTEN.search, prompts)):
            setattr(p, name, list(map(without_tags, prompts)))
            said = [f"<{TAG}:...> has no effect in a negative prompt: write it in the prompt"]
    rows = slice(number * p.batch_size, (number + 1) * p.batch_size)
    for name in ("all_prompts", "all_hr_prompts"):
        prompts = list((getattr(p, name, None) or [])[rows])
        differing = [i for i, prompt in enumerate(prompts) if _WRITTEN.findall(prompt) != _WRITTEN.findall(prompts[0])]
        if differing:
            every = getattr(p, name)
            for i in differing:
                every[rows.start + i] = without_tags(prompts[i])
            said.append(
                f"the <{TAG}:...> tags of the first prompt count for all pictures of a batch, and those of the others "
                "were left out: choose batch size 1, and a batch count, to have each follow its own"
            )
    return list(dict.fromkeys(said))
