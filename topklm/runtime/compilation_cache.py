"""Compiled programs kept in the user's cache folder, so that the next start of a run compiles none of them.

JAX's persistent compilation cache with another store under it: JAX's own leaves half a file when it is
killed or the disk fills up, complains of that file at every later start, and has no bound that works.
"""

import contextlib
import hashlib
import os
from pathlib import Path
import platform
import stat
import sys

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from topklm.errors import UserError
from topklm.storage.files import write_atomically

SWITCH = "TOPKLM_COMPILATION_CACHE"

_FOLDER = "jax_compilation_cache_dir"  # JAX's setting
_MOST_BYTES = 2 << 30  # a program of this project takes kilobytes on a CPU, up to some 100 MB for a pod
_CPU_FACTS = Path("/proc/cpuinfo")
# The compiler looks at these: on x86, then on ARM.
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
_DIGEST_BYTES = hashlib.sha256().digest_size


def enable() -> bool:
    """Keeps what is compiled from now on, and tells whether; without a folder to use, changes nothing.

    Call it after `jax.distributed` is set up and before anything is compiled. It does nothing where

    *   the user said so: TOPKLM_COMPILATION_CACHE=off, or JAX_COMPILATION_CACHE_DIR for their own folder;
    *   there are several processes. JAX writes from the first one only, and GPUs compile together: if that
        one finds its program and the others do not, they wait for it for ever. They need one folder that all
        of them see, which only the user can name.
    """
    if os.environ.get(SWITCH) == "off" or jax.distributed.is_initialized():
        return False
    if jax.config.values[_FOLDER]:
        return True
    try:
        use(_root() / _machine())
        return True
    except UserError as e:
        print(f"warning: {e}", file=sys.stderr, flush=True)
    except (OSError, RuntimeError):
        pass  # no home, or one that is read-only: then every start compiles
    return False


def use(folder: Path) -> None:
    """Keeps programs in a folder that nobody else writes to but runs of this machine's kind; see `enable`.

    OSError if it cannot be made, UserError if somebody else could have put programs into it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write there can run code as the user
    _check_private(folder)
    compilation_cache.get_file_cache = lambda path: (Programs(Path(path)), path)
    jax.config.update(_FOLDER, str(folder))
    # The small ones add up too: a start looks for some ten programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA's own caches for GPUs lie in the same folder, have no bound, and fail on a full disk.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _check_private(folder: Path) -> None:
    """Refuses a folder, or one of ours around it, that another user owns or can write to.

    The folders around it are made with the user's umask, so the user's group may write there.
    """
    sticky = stat.S_ISVTX  # only its owner may take a file's place
    for path, others, unless in (
        (folder, 0o022, 0),
        (folder.parent, 0o002, sticky),
        (folder.parent.parent, 0o002, sticky),
    ):
        status = path.stat()
        if status.st_uid != os.geteuid() or (status.st_mode & others and not status.st_mode & unless):
            raise UserError(
                f"{path} belongs to another user, or others can write to it: programs are compiled anew and "
                "not kept. Mend its owner and mode, or choose another folder with XDG_CACHE_HOME "
                f"({SWITCH}=off: none)"
            )


class Programs(CacheInterface):
    """Files of one folder, each the SHA-256 of a program and the program; those used last are kept.

    Nothing is locked: a file appears whole, and whatever else happens to it is noticed when it is read. A
    disk that refuses only means that a program is compiled again.
    """

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES):
        """Takes a folder that exists; `most_bytes` counts what lies in the folders beside it too."""
        self._path, self._most_bytes = folder, most_bytes

    def get(self, key: str) -> bytes | None:
        """Returns the program, or None if it is missing or damaged."""
        path = self._path / key
        try:
            content = path.read_bytes()
        except OSError:
            return None
        digest, program = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(program).digest() != digest:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return program

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program, and forgets those that have not been used for longest."""
        with contextlib.suppress(OSError):
            write_atomically(self._path / key, hashlib.sha256(value).digest() + value)
            self._prune()

    def _prune(self) -> None:
        files = [(path, path.stat()) for path in self._path.parent.glob("*/*")]
        total = sum(status.st_size for _, status in files)
        for path, status in sorted(files, key=lambda file: file[1].st_mtime):
            if total <= self._most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size


def _root() -> Path:
    """Returns the cache folder of the XDG base directory specification, which ignores a relative path."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "topklm" / "xla"


def _machine() -> str:
    """Returns the name of the folder for this kind of CPU and this JAX.

    Programs for a CPU use all of its instructions, and a home is often shared by machines of several kinds:
    another one would die of an illegal instruction.
    """
    try:
        facts = _CPU_FACTS.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        cpu = "\n".join(line for line in facts if line.partition(":")[0].strip() in _CPU_FIELDS)
    except OSError:
        cpu = platform.node()
    kind = hashlib.sha256(f"{platform.machine()}\n{cpu}".encode()).hexdigest()[:12]
    return f"jax-{jax.__version__}-{platform.machine()}-{kind}"
