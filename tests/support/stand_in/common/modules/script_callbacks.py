"""Callbacks of extensions; swallows an Exception (here: into ``swallowed``), but no BaseException."""

from collections import defaultdict
from types import SimpleNamespace

registered = defaultdict(list)
swallowed = []


def _registrar(kind):
    def register(callback):
        registered[kind].append(callback)

    return register


on_before_ui = _registrar("before_ui")
on_cfg_denoiser = _registrar("cfg_denoiser")
on_cfg_denoised = _registrar("cfg_denoised")
on_cfg_after_cfg = _registrar("cfg_after_cfg")


def call(kind, *arguments, **named):
    """Call all registered callbacks with an object of the fields ``named``, and return it."""
    params = SimpleNamespace(**named)
    for callback in registered[kind]:
        _swallow(callback, *arguments, *([params] if named else []))
    return params


def _swallow(callback, *arguments):
    try:
        callback(*arguments)
    except Exception as error:
        swallowed.append(error)
