"""What the package is called in reports and on the command line, and what a result may depend on."""

import platform
from importlib import metadata

__version__ = "0.2.0"


def library_versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("secateur", "torch", "transformers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
