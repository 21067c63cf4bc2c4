"""A small WebUI around the real accordion, in the installed gradio: `python tests/browser/webui/app.py PORT`.

It has two tabs, a Generate button that calls the script's hooks, PNG info and an XYZ axis.  Instead of running a
model, it draws a picture of the settings that arrived.
"""

import itertools
import sys
import time
import types
from copy import copy
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE), str(ROOT)]

import gradio as gr  # noqa: E402
from fastapi import Depends, HTTPException  # noqa: E402
from fastapi.security import HTTPBasic, HTTPBasicCredentials  # noqa: E402
from modules import infotext_utils, script_callbacks, scripts  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from tests.support.stand_in_host import use_stand_in_host  # noqa: E402

SIZE = 160
CARDS = {"moxin": "<lora:moxin:0.7> moxin style", "ball": "ball"}  # of a LoRA, and of another network
SCRIPTS = [str(HERE / "scripts" / "xyz_grid.py"), str(ROOT / "scripts" / "delta_sampling.py")]
RUNS = itertools.count(1)


def generate(runner, prompt, axis, values, arguments):
    """Return pictures, their infotext and the log, as the WebUI's generate function does."""
    began = time.perf_counter()
    p = types.SimpleNamespace(prompt=prompt, steps=20, script_args=arguments, extra_generation_params={})
    try:
        cells = runner.selectable_scripts[0].cells(p, axis, values) if axis != "Nothing" else [p]
        done = [generate_one(runner, copy(cell)) for cell in cells]
    except Exception as error:
        done = [(None, f"{type(error).__name__}: {error}")]
    pictures = [picture for picture, _ in done if picture]
    text = "\n\n".join(text for _, text in done)
    # The log names the generation and its text, since the page may update one before the other.
    attributes = f'data-run="{next(RUNS)}" title="{escape(text)}"'
    return pictures, text, f"<p {attributes}>Time taken: {time.perf_counter() - began:.4f} sec.</p>"


def generate_one(runner, p):
    """Call the hooks in the WebUI's order, and draw."""
    p.extra_generation_params = {}
    runner.call("process", p)
    runner.call("process_batch", p, batch_number=0)
    runner.call("process_before_every_sampling", p)
    if getattr(p, "delta_error", None):
        raise p.delta_error
    picture = draw(p.delta_request)
    runner.call("postprocess", p, None)
    values = {"Steps": p.steps, "Sampler": "Euler", "Seed": 1, **p.extra_generation_params}
    line = ", ".join(f"{name}: {infotext_utils.quote(value)}" for name, value in values.items())
    return picture, f"{p.prompt}\n{line}"


def draw(request):
    """Draw lambda over the run as colours, from the first step at the top to the last at the bottom."""
    picture = Image.new("RGB", (SIZE, SIZE))
    pen, strength = ImageDraw.Draw(picture), request.lambda_over_run()
    for y in range(SIZE):
        share = min(strength.at(y / (SIZE - 1)) / 5, 1) if request.enabled else 0
        pen.line([(0, y), (SIZE, y)], fill=(int(60 + 190 * share), 70, int(200 - 150 * share)))
    return picture


def card(tab, label, text):
    """Return a card of the Lora tab, which adds a text to the prompt."""
    call = escape(f"cardClicked({tab!r}, {text!r}, '', true)")
    return f'<button id="{tab}_card_{label}" onclick="{call}">{label}</button> '


def tab(name):
    """Make one tab, and return its runner, its paste fields and its button to send from."""
    runner = scripts.ScriptRunner(name == "img2img")
    with gr.Row():
        prompt = gr.Textbox(label="Prompt", elem_id=f"{name}_prompt", value="a harbour at night", lines=2, scale=4)
        button = gr.Button("Generate", elem_id=f"{name}_generate", variant="primary", scale=1)
    with gr.Row():
        with gr.Column(min_width=320):
            runner.setup_ui()
            grid = scripts_module("xyz_grid.py")
            with gr.Accordion("X/Y/Z plot", open=False):
                axis = gr.Dropdown(
                    [option.label for option in grid.axis_options],
                    value="Nothing",
                    label="X type",
                    elem_id=f"{name}_axis",
                )
                values = gr.Textbox(label="X values", elem_id=f"{name}_axis_values")
        with gr.Column(min_width=320):
            gr.HTML("".join(card(name, label, text) for label, text in CARDS.items()))
            gallery = gr.Gallery(label="Output", elem_id=f"{name}_gallery", elem_classes=["delta-picture"], columns=4)
            text = gr.Textbox(label="Text of the picture", elem_id=f"{name}_infotext", lines=3)
            log = gr.HTML(elem_id=f"html_log_{name}")
            send = gr.Button("Send to the other tab", elem_id=f"{name}_send")
    button.click(
        lambda prompt, axis, values, *arguments: generate(runner, prompt, axis, values, arguments),
        inputs=[prompt, axis, values, *runner.inputs],
        outputs=[gallery, text, log],
    )
    return runner, [(prompt, "Prompt"), *runner.infotext_fields], send


def scripts_module(name):
    """Return a loaded script's module."""
    return next(data.module for data in scripts.scripts_data if data.module.__name__ == name)


def build():
    """Build the page in the WebUI's order."""
    scripts.load_scripts(SCRIPTS)
    script_callbacks.call("ui_settings")
    script_callbacks.call("before_ui")
    plain = gr.themes.Default(font=["Source Sans Pro", "sans-serif"], font_mono=["monospace"])  # no downloads
    with gr.Blocks(theme=plain, title="stand-in", analytics_enabled=False) as page:
        tabs = {}
        with gr.Tabs(elem_id="tabs"):
            for name in ("txt2img", "img2img"):
                with gr.Tab(name, elem_id=f"tab_{name}"):
                    tabs[name] = tab(name)
            with gr.Tab("PNG info", elem_id="tab_pnginfo"):
                text = gr.Textbox(label="Text of a picture", lines=4, elem_id="pnginfo_text")
                for name, (_, pasted, _) in tabs.items():
                    button = gr.Button(f"Send to {name}", elem_id=f"pnginfo_to_{name}")
                    infotext_utils.connect_paste(button, pasted, text)
        for name, other in (("txt2img", "img2img"), ("img2img", "txt2img")):
            runner, source, button = tabs[name]
            infotext_utils.connect_send(button, source, tabs[other][1], ["Prompt", *runner.paste_field_names])
    return page


def check_password(given: HTTPBasicCredentials = Depends(HTTPBasic())):  # noqa: B008
    """Refuse all API calls without the right password."""
    if (given.username, given.password) != ("user", "password"):
        raise HTTPException(status_code=401, detail="Incorrect username or password")


def get_options():
    """Return the settings, an empty dictionary."""
    return {}


def add_to_page(*texts):
    """Add scripts and styles to the head of the page, where the WebUI adds those of extensions."""
    original = gr.routes.templates.TemplateResponse

    def response(*arguments, **named):
        made = original(*arguments, **named)
        made.body = made.body.replace(b"</head>", "".join(texts).encode() + b"</head>")
        made.init_headers()
        return made

    gr.routes.templates.TemplateResponse = response


def main(port):
    """Serve until the process is terminated."""
    use_stand_in_host()
    page = build()
    add_to_page(
        f"<style>{(HERE / 'page.css').read_text()}{(ROOT / 'style.css').read_text()}</style>",
        f"<script>{(HERE / 'page.js').read_text()}</script>",
        f"<script>{(ROOT / 'javascript' / 'delta_sampling.js').read_text()}</script>",
    )
    page.queue()
    app, _, _ = page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, show_api=False)
    app.add_api_route("/sdapi/v1/options", get_options, methods=["GET"], dependencies=[Depends(check_password)])
    script_callbacks.call("app_started", page, app)
    print("ready", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main(int(sys.argv[1]))
