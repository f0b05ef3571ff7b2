"""What the tests of compiled programs share."""

import json
import os
from pathlib import Path
import subprocess
import sys

from helpers import ROOT
import pytest


@pytest.fixture(scope="session")
def compiled():
    """The texts of the functions in programs.py, by name."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    program = Path(__file__).with_name("programs.py")
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
