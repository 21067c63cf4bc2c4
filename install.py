"""Report missing packages when the WebUI starts.  Nothing is installed: WebUIs include all requirements."""

from importlib.util import find_spec

NEEDED = ("torch", "safetensors", "transformers")

missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    print(
        f"Delta Sampling needs {' and '.join(missing)}, which every WebUI that it is made for has: "
        "reinstall the WebUI's requirements, or install them into its environment."
    )
