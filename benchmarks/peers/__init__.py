"""The same work done by other libraries, which nothing but benchmarks and tests imports."""

import importlib.util

from topklm.errors import UserError

_PACKAGES = ("torch", "transformers")


def require(peer: str) -> None:
    """Refuses a peer that is not installed.

    Raises:
        UserError: Naming the extra to install.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--peer = {peer}: {package} is not installed; pip install 'topklm[peers]'")
