"""The trainer, `topklm.main`, whose every process keeps what it has compiled, in $KEPT_PROGRAMS.

JAX lets only the first process of several write, and on CPUs each compiles programs of its own: a test that
starts a job dozens of times would do nothing but compile.
"""

import os
from pathlib import Path
import sys
from unittest import mock

from jax._src import compiler

from topklm import main
from topklm.runtime import compilation_cache


def write_as_if_first(*arguments):
    with mock.patch.object(compiler.distributed.global_state, "process_id", 0):
        write(*arguments)


if __name__ == "__main__":
    write, compiler._cache_write = compiler._cache_write, write_as_if_first
    compilation_cache.use(Path(os.environ["KEPT_PROGRAMS"]) / os.environ["TOPKLM_PROCESS_ID"])
    sys.exit(main.run())
