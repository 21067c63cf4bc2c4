"""Callbacks that scripts register while they are loaded; loading scripts anew drops them."""

from collections import defaultdict

callbacks = defaultdict(list)


def clear_callbacks():
    """Forget all, as the WebUI does before it loads scripts."""
    callbacks.clear()


def call(category, *arguments):
    """Call those of one category in their order."""
    for callback in list(callbacks[category]):
        callback(*arguments)


def on_ui_settings(callback, *, name=None):
    """Called when the settings page is made."""
    callbacks["ui_settings"].append(callback)


def on_before_ui(callback, *, name=None):
    """Called before the user interface is made."""
    callbacks["before_ui"].append(callback)


def on_app_started(callback, *, name=None):
    """Called with the Blocks (None without a user interface) and the FastAPI application."""
    callbacks["app_started"].append(callback)
