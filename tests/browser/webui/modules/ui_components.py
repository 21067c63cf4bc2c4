"""The WebUI's widgets.  As there, InputAccordion is a class on gradio 3 and a function on gradio 4."""

from functools import wraps

import gradio as gr

GRADIO_4 = int(gr.__version__.split(".")[0]) >= 4
if GRADIO_4:
    gr.component_meta.create_or_modify_pyi = lambda *_: None  # gradio would write a file next to this one


class InForms:
    """Widgets that join the form of their neighbours."""

    def get_expected_parent(self):
        """Return the container that gradio makes around them."""
        return gr.components.Form


gr.Dropdown.get_expected_parent = InForms.get_expected_parent


class FormRow(*((gr.Row, InForms) if GRADIO_4 else (InForms, gr.Row))):
    """A row inside a form."""

    def get_block_name(self):
        """Return gradio's name of the component."""
        return "row"


class ToolButton(*((gr.Button, InForms) if GRADIO_4 else (InForms, gr.Button))):
    """A small square button next to another widget."""

    @wraps(gr.Button.__init__)  # gradio 4 sends the page the arguments in the signature
    def __init__(self, *values, elem_classes=(), **given):
        super().__init__(*values, elem_classes=["tool", *elem_classes], **given)

    def get_block_name(self):
        """Return gradio's name of the component."""
        return "button"


class InputAccordionBox(gr.Checkbox):
    """A hidden checkbox and an accordion; the page's script synchronizes them."""

    accordion = None

    def attach(self, elem_id, label, is_open):
        """Make the accordion of the checkbox."""
        follow = {"js" if GRADIO_4 else "_js": f"(on) => standInFollow('{elem_id}', on)"}
        self.change(fn=None, inputs=[self], **follow)
        self.accordion = gr.Accordion(label, open=is_open, elem_id=elem_id, elem_classes=["input-accordion"])

    def get_block_name(self):
        """Return gradio's name of the component."""
        return "checkbox"

    def __enter__(self):
        self.accordion.__enter__()
        return self

    def __exit__(self, *exception):
        self.accordion.__exit__(*exception)


if GRADIO_4:

    def InputAccordion(value=None, *, elem_id, label):  # noqa: N802 - the WebUI's name
        """Make the pair; gradio 4 copies components from their arguments, so these must be a checkbox's."""
        box = InputAccordionBox(value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
        box.attach(elem_id, label, value)
        return box

else:

    class InputAccordion(InputAccordionBox):
        """The pair."""

        def __init__(self, value=None, *, elem_id, label):
            super().__init__(value, label=label, elem_id=f"{elem_id}-checkbox", visible=False)
            self.attach(elem_id, label, value)
