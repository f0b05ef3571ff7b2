"""A program that this jax cannot read is one line that says what to install."""

import importlib.util

import jax
import pytest

from topklm.compile_check import check
from topklm.errors import UserError


class Unreadable:
    """Stands in for what a libtpu of another version has compiled."""

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update has 3 operands")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_versions_are_named():
    with pytest.raises(UserError, match=r"libtpu [\d.]+ has compiled cannot be read by jax [\d.]+: install"):
        check._parsed(Unreadable())


def test_without_libtpu_the_error_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(jax.errors.JaxRuntimeError):
        check._parsed(Unreadable())
