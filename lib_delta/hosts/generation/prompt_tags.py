"""``<delta:NAME:lambda>`` tags in the prompts of a batch.

They work as AUTOMATIC1111's ``<lora:...>`` tags do: those of the first prompt apply to all pictures of the batch,
and those of the first hires prompt to the hires pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modules import extra_networks

from lib_delta.request.passes import Passes
from lib_delta.request.request import Request

TAG = "delta"
_TAGS = re.compile(rf"<{TAG}:[^>]+>")
RequestOfTags = Callable[[list[list[str]]], Request]


def register_tag() -> None:
    """Register the tag with the WebUI, which then takes it out of prompts."""

    class DeltaTag(extra_networks.ExtraNetwork):  # type: ignore[misc]
        """Does nothing: each batch reads its tags from ``p`` (:func:`passes_of`)."""

        def __init__(self) -> None:
            super().__init__(TAG)

        def activate(self, p: Any, params_list: Any) -> None:
            pass

        def deactivate(self, p: Any) -> None:
            pass

    extra_networks.register_extra_network(DeltaTag())


def passes_of(p: Any, read: RequestOfTags) -> Passes:
    """Return the requests of a batch's passes; ``read`` returns the request of a prompt's tags."""
    first = _tags(getattr(p, "extra_network_data", None))
    hires = _tags(getattr(p, "hr_extra_network_data", None)) if getattr(p, "enable_hr", False) else first
    request = read(first)
    return Passes(request, request if hires == first else read(hires))


def _tags(data: Mapping[str, Sequence[Any]] | None) -> list[list[str]]:
    return [[str(item) for item in params.items] for params in (data or {}).get(TAG, [])]


def without_tags(prompt: str) -> str:
    """Return a prompt without the extension's tags."""
    return _TAGS.sub("", prompt)


def drop_ignored_tags(p: Any, batch: int) -> list[str]:
    """Remove tags that have no effect from the prompts of a batch; return sentences for the user.

    Negative prompts would be encoded with the tags as words.  Infotexts of all but the first picture would claim
    tags of a prompt that its picture does not follow.
    """
    return [*_drop_from_negative_prompts(p), *_drop_differing(p, batch)]


def _drop_from_negative_prompts(p: Any) -> list[str]:
    dropped = False
    for name in ("negative_prompts", "hr_negative_prompts"):
        prompts = getattr(p, name, None) or []
        if any(map(_TAGS.search, prompts)):
            setattr(p, name, list(map(without_tags, prompts)))
            dropped = True
    return [f"<{TAG}:...> has no effect in a negative prompt: write it in the prompt"] if dropped else []


def _drop_differing(p: Any, batch: int) -> list[str]:
    """Remove tags that differ from the first prompt's in the texts that go into infotexts."""
    start, dropped = batch * p.batch_size, False
    for name in ("all_prompts", "all_hr_prompts"):
        all_prompts = getattr(p, name, None) or []
        prompts = list(all_prompts[start : start + p.batch_size])
        for i, prompt in enumerate(prompts):
            if _TAGS.findall(prompt) != _TAGS.findall(prompts[0]):
                all_prompts[start + i] = without_tags(prompt)
                dropped = True
    sentence = (
        f"the <{TAG}:...> tags of the first prompt count for all pictures of a batch, and those of the others "
        "were left out: choose batch size 1, and a batch count, to have each follow its own"
    )
    return [sentence] if dropped else []
