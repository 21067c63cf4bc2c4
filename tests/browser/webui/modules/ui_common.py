"""The button that refreshes a dropdown's choices."""

import gradio as gr

from modules.ui_components import ToolButton

refresh_symbol = "\U0001f504"


def create_refresh_button(refresh_component, refresh_method, refreshed_args, elem_id):
    """Make a button that calls ``refresh_method`` and then updates the component with ``refreshed_args()``."""

    def refresh():
        refresh_method()
        given = refreshed_args() if callable(refreshed_args) else refreshed_args
        for name, value in given.items():
            setattr(refresh_component, name, value)
        return gr.update(**given)

    button = ToolButton(refresh_symbol, elem_id=elem_id)
    button.click(refresh, inputs=[], outputs=[refresh_component])
    return button
