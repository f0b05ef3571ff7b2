"""Fixtures of the tests of compiled programs."""

import json
import os
from pathlib import Path
import subprocess
import sys

from helpers import ROOT, devices
import pytest


@pytest.fixture(scope="session")
def compiled():
    """Returns the texts of the functions in programs.py, by name."""
    environment = {**os.environ, **devices(8), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    program = Path(__file__).with_name("programs.py")
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
