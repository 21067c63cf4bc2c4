"""Prompt editing ``[a:b:when]`` and ``[a|b]``, and prompts joined by AND, as the WebUI's parser returns them."""

import re
from collections import namedtuple

import torch

ScheduledPromptConditioning = namedtuple("ScheduledPromptConditioning", ["end_at_step", "cond"])
EDIT = re.compile(r"\[([^\[\]:|]*):([^\[\]:|]*):([\d.]+)\]")
TURNS = re.compile(r"\[([^\[\]:]*\|[^\[\]:]*)\]")
WEIGHT = re.compile(r"\s*:\s*([-+]?[\d.]+)\s*$")


class SdConditioning(list):
    """Prompts with the picture's size, which SDXL is conditioned on."""

    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)
        copied = prompts if copy_from is None else copy_from
        self.is_negative_prompt = is_negative_prompt or getattr(copied, "is_negative_prompt", False)
        self.width = width or getattr(copied, "width", None)
        self.height = height or getattr(copied, "height", None)


class Part:
    """One of the prompts joined by AND."""

    def __init__(self, schedules, weight):
        self.schedules, self.weight = schedules, weight


class MulticondLearnedConditioning:
    """The parts of each prompt."""

    def __init__(self, batch):
        self.batch = batch


def schedule(prompt, steps, hires_steps=None):
    """Return ``(end_at_step, text)`` pairs; times of a hires pass continue those of the first pass."""
    before, passes, count = (0, 0.0, steps) if hires_steps is None else (steps, 1.0, hires_steps)

    def when(text):
        moment = (float(text) - passes) * count if "." in text else int(text) - before
        return min(count, int(moment))

    def at(step):
        text = EDIT.sub(lambda m: m[1] if step <= when(m[3]) else m[2], prompt)
        return TURNS.sub(lambda m: m[1].split("|")[(step - 1) % len(m[1].split("|"))], text)

    ends = {count, *(when(m[3]) for m in EDIT.finditer(prompt))}
    if TURNS.search(prompt):
        ends.update(range(1, count + 1))
    return [(end, at(end)) for end in sorted(ends) if end >= 1]


def get_learned_conditioning(model, prompts, steps, hires_steps=None):
    """Return each prompt's schedule of encoded texts; a prompt's texts are encoded together."""
    schedules = []
    for prompt in prompts:
        times = schedule(prompt, steps, hires_steps)
        encoded = model.get_learned_conditioning(SdConditioning([text for _, text in times], copy_from=prompts))
        if isinstance(encoded, dict):
            encoded = [{key: value[i] for key, value in encoded.items()} for i in range(len(times))]
        schedules.append([ScheduledPromptConditioning(end, cond) for (end, _), cond in zip(times, encoded)])
    return schedules


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None):
    """Do the same for prompts joined by AND."""
    batch = []
    for prompt in prompts:
        parts = []
        for text in re.split(r"\bAND\b", prompt):
            weight = WEIGHT.search(text)
            text = WEIGHT.sub("", text)
            (schedules,) = get_learned_conditioning(
                model, SdConditioning([text], copy_from=prompts), steps, hires_steps
            )
            parts.append(Part(schedules, float(weight[1]) if weight else 1.0))
        batch.append(parts)
    return MulticondLearnedConditioning(batch)


def _holding(entries, step):
    return next((entry.cond for entry in entries if step <= entry.end_at_step), entries[0].cond)


def reconstruct_cond_batch(schedules, step):
    """Return the conditioning at a step, ``(N, T, C)``; all lengths must be equal."""
    return torch.stack([_holding(entries, step) for entries in schedules])


def reconstruct_multicond_batch(conds, step):
    """Return each prompt's parts as ``(row, weight)``, and the rows; shorter ones repeat their last vector."""
    rows, numbered = [], []
    for parts in conds.batch:
        numbered.append([(len(rows) + i, part.weight) for i, part in enumerate(parts)])
        rows += [_holding(part.schedules, step) for part in parts]
    longest = max(map(len, rows))
    return numbered, torch.stack([torch.cat((row, row[-1:].repeat(longest - len(row), 1))) for row in rows])
