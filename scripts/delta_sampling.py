"""Delta Sampling as a script of the WebUI: it makes the accordion and passes each hook on.

``lib_delta.hosts.ui`` has the widgets, and ``lib_delta.hosts`` does the work.
"""

from pathlib import PurePath

from modules import script_callbacks, scripts

from lib_delta.hosts import host
from lib_delta.hosts.ui.accordion import TITLE, Accordion
from lib_delta.hosts.ui.api import add_routes, join_adetailer
from lib_delta.hosts.ui.settings_page import add_settings
from lib_delta.hosts.ui.xyz_axes import add_axes


class DeltaSampling(scripts.Script):
    """The accordion in both tabs, and the hooks of a generation."""

    def title(self):
        """Return the name by which the API calls the script."""
        return TITLE

    def show(self, is_img2img):
        """Show the accordion in both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        """Make the widgets, and return those of the settings in the order of positional arguments."""
        accordion = Accordion(self.elem_id, is_img2img)
        self.infotext_fields = [*accordion.restored, *accordion.unfolded]
        self.paste_field_names = [read for _, read in accordion.restored]
        return accordion.inputs

    def process(self, p, *arguments):
        """Read the settings; the generation reports a wrong one."""
        host().process(p, arguments)

    def process_batch(self, p, *arguments, **batch):
        """Prepare a batch, whose prompts are final now."""
        host().process_batch(p)

    def process_before_every_sampling(self, p, *arguments, **sampling):
        """Prepare one pass."""
        host().before_sampling(p)

    def postprocess(self, p, processed, *arguments):
        """Clean up after a generation."""
        host().postprocess(p, processed)


def on_app_started(_, app):
    """Add the API routes, and this script to ADetailer's list.

    Without a user interface (--nowebui), ``on_before_ui`` is never called: the axes are added here as well.
    """
    add_axes()
    join_adetailer(PurePath(__file__).stem)
    add_routes(app)


script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_before_ui(add_axes)
script_callbacks.on_app_started(on_app_started)
host().start()
