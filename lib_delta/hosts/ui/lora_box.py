"""The accordion's LoRAs: the box that holds them, a list to add from, and below it a row for each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gradio as gr
from modules.ui_components import FormRow

from lib_delta.hosts import host
from lib_delta.hosts.ui.widgets import HIDDEN, QUIET, ROW, refresh_button
from lib_delta.page.lora_rows import BoxTexts, add_lora, apply_edit, render_rows
from lib_delta.request.request import NONE


class LoraBox:
    """The widgets, and what they do to each other."""

    def __init__(self, elem_id: Callable[[str], str], default: str) -> None:
        """Make them; ``elem_id`` completes a name to the id of an element of the tab."""
        with gr.Row(**ROW):
            with gr.Column(min_width=240), FormRow():
                self.loras = gr.Textbox(
                    label="LoRAs",
                    placeholder="name:weight, name:weight:te=0.5",
                    value=default,  # named, for pasting goes by the type of the widget's default
                    lines=1,
                    max_lines=4,
                    elem_id=elem_id("loras"),
                )
            with gr.Column(min_width=240), FormRow():
                self.more = gr.Dropdown(
                    label="Add a LoRA",
                    choices=lora_choices(),
                    value=NONE,
                    interactive=True,  # gradio takes a widget that is no event's input for one that only shows
                    elem_id=elem_id("add_lora"),
                )
                refresh_button(self.more, host().catalog.refresh_loras, lora_choices, elem_id("refresh_add_lora"))
        self.rows = gr.HTML(
            render_rows(BoxTexts(default), host().catalog.card),
            elem_id=elem_id("picked"),
            elem_classes=["delta-sampling-picked"],
        )
        gr.Checkbox(label="A click on a LoRA's card adds it here", value=False, elem_id=elem_id("cards"))
        # The script of the page writes what was done with a row or a card into the box, and clicks the first button;
        # the second when an answer that came late has left the rows of an older text.
        self.edit = gr.Textbox(label="Edit of the LoRAs", elem_id=elem_id("edit"), **HIDDEN)
        self.apply = gr.Button("Edit the LoRAs", elem_id=elem_id("apply_edit"), **HIDDEN)
        self.redraw = gr.Button("Show the LoRAs anew", elem_id=elem_id("redraw_picked"), **HIDDEN)
        self.edit.do_not_save_to_config = True

    def connect(self, prompt: Any, negative_prompt: Any, prompts: Any) -> None:
        """Let the box and the two prompts of the side model follow what is done; ``prompts`` unfolds with them."""
        told = [self.loras, prompt, negative_prompt]
        for event in (self.loras.change, self.redraw.click):
            event(rows_of, inputs=told, outputs=[self.rows], **QUIET)
        self.apply.click(apply_edit_json, inputs=[self.edit, *told], outputs=[*told, self.rows, prompts], **QUIET)
        self.more.select(with_lora, inputs=[self.loras], outputs=[self.loras, self.more], **QUIET)


def lora_choices() -> list[str]:
    """Return what the LoRA dropdown offers."""
    return [NONE, *host().catalog.loras()]


def with_lora(loras: str, selected: gr.SelectData) -> tuple[str, str]:
    """Return the recipe with the selected LoRA, once, and the dropdown's empty choice."""
    if selected.value == NONE:
        return loras, NONE
    return add_lora(loras, selected.value, host().catalog.card(selected.value).weight), NONE


def rows_of(*told: str) -> str:
    """Return the rows of what is told."""
    return render_rows(BoxTexts(*told), host().catalog.card)


def apply_edit_json(edit: str, *told: str) -> tuple[Any, ...]:
    """Return the three texts after an edit (JSON), their rows, and whether the prompts are to unfold."""
    before = BoxTexts(*told)
    try:
        after = apply_edit(before, json.loads(edit), host().catalog.card)
    except (ValueError, AttributeError):  # no edit: the page's script has not written one yet
        after = before
    prompts_changed = (after.prompt, after.negative_prompt) != (before.prompt, before.negative_prompt)
    texts = after.loras, after.prompt, after.negative_prompt
    return *texts, render_rows(after, host().catalog.card), gr.update(open=True) if prompts_changed else gr.update()
