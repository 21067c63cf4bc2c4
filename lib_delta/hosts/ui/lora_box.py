"""The accordion's LoRAs: a box with their recipe, a list to add from, and a row for each LoRA."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
from modules.ui_components import FormRow

from lib_delta.hosts import host
from lib_delta.hosts.ui.widgets import HIDDEN, QUIET, ROW, ElemId, FieldWidgets, refresh_button
from lib_delta.page.lora_rows import BoxTexts, add_lora, apply_edit, render_rows
from lib_delta.request.setting_choices import NONE


class LoraBox:
    """The widgets, and the events between them."""

    def __init__(self, elem_id: ElemId, make: FieldWidgets) -> None:
        with gr.Row(**ROW):
            with gr.Column(min_width=240), FormRow():
                make.textbox("loras", lines=1, max_lines=4)
                self.loras = make.made["loras"]
            with gr.Column(min_width=240), FormRow():
                self.add = gr.Dropdown(
                    label="Add a LoRA",
                    choices=lora_choices(),
                    value=NONE,
                    interactive=True,  # gradio makes a widget read-only that is no event's input
                    elem_id=elem_id("add_lora"),
                )
                refresh_button(self.add, host().catalog.refresh_loras, lora_choices, elem_id("refresh_add_lora"))
        self.rows = gr.HTML(
            render_rows(BoxTexts(self.loras.value), host().catalog.card),
            elem_id=elem_id("picked"),
            elem_classes=["delta-sampling-picked"],
        )
        gr.Checkbox(label="A click on a LoRA's card adds it here", value=False, elem_id=elem_id("cards"))
        # The page's script writes an edit of a row or a click on a card into the box, and clicks the first button.  It
        # clicks the second if a late answer has left the rows of an older text.
        self.edit = gr.Textbox(label="Edit of the LoRAs", elem_id=elem_id("edit"), **HIDDEN)
        self.apply = gr.Button("Edit the LoRAs", elem_id=elem_id("apply_edit"), **HIDDEN)
        self.redraw = gr.Button("Show the LoRAs anew", elem_id=elem_id("redraw_picked"), **HIDDEN)
        self.edit.do_not_save_to_config = True

    def connect(self, prompt: Any, negative_prompt: Any, prompts: Any) -> None:
        """Connect the box with the side model's two prompts, and with ``prompts``, the accordion around them."""
        texts = [self.loras, prompt, negative_prompt]
        for event in (self.loras.change, self.redraw.click):
            event(rows_of, inputs=texts, outputs=[self.rows], **QUIET)
        self.apply.click(apply_edit_json, inputs=[self.edit, *texts], outputs=[*texts, self.rows, prompts], **QUIET)
        self.add.select(with_lora, inputs=[self.loras], outputs=[self.loras, self.add], **QUIET)


def lora_choices() -> list[str]:
    """Return the choices of the LoRA dropdown."""
    return [NONE, *host().catalog.loras()]


def with_lora(loras: str, selected: gr.SelectData) -> tuple[str, str]:
    """Return the recipe with the selected LoRA, at most once, and the dropdown's empty choice."""
    if selected.value == NONE:
        return loras, NONE
    return add_lora(loras, selected.value, host().catalog.card(selected.value).weight), NONE


def rows_of(*texts: str) -> str:
    """Return the rows of the LoRAs as HTML; ``texts`` are the fields of :class:`BoxTexts`."""
    return render_rows(BoxTexts(*texts), host().catalog.card)


def apply_edit_json(edit: str, *texts: str) -> tuple[Any, ...]:
    """Return the three texts after an edit (JSON), their rows, and the update that unfolds changed prompts."""
    before = BoxTexts(*texts)
    try:
        after = apply_edit(before, json.loads(edit), host().catalog.card)
    except (ValueError, AttributeError):  # the page's script has not written an edit yet
        after = before
    prompts_changed = (after.prompt, after.negative_prompt) != (before.prompt, before.negative_prompt)
    unfold = gr.update(open=True) if prompts_changed else gr.update()
    return after.loras, after.prompt, after.negative_prompt, render_rows(after, host().catalog.card), unfold
