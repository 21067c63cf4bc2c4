"""Callbacks that scripts register when they are loaded; reloading scripts drops them."""

from collections import defaultdict

callbacks = defaultdict(list)


def clear_callbacks():
    """Drop all callbacks, as the WebUI does before it loads scripts."""
    callbacks.clear()


def call(category, *arguments):
    """Call the callbacks of one category in their order."""
    for callback in list(callbacks[category]):
        callback(*arguments)


def on_ui_settings(callback, *, name=None):
    """Call it when the settings page is built."""
    callbacks["ui_settings"].append(callback)


def on_before_ui(callback, *, name=None):
    """Call it before the user interface is built."""
    callbacks["before_ui"].append(callback)


def on_app_started(callback, *, name=None):
    """Call it with the Blocks (None without a user interface) and the FastAPI application."""
    callbacks["app_started"].append(callback)
