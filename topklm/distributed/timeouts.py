"""Reads how long to wait from the environment."""

import os

from topklm.errors import UserError


def seconds(name: str, default: float) -> float:
    """Returns the number of seconds in the environment variable `name`, or the default.

    Raises:
        UserError: If it is not a number above 0.
    """
    text = os.environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{name} = {text!r}: must be a number of seconds above 0")
    return value
