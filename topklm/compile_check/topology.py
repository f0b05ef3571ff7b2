"""TPU slices as libtpu describes them, virtual CPU devices, and what data sheets say of chips."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from topklm.errors import UserError

GIB = 2**30

# Without a TPU in the machine, libtpu would ask a metadata server for one, and print that it found none.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any known one: the topology asked for is what counts
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no lock on the device
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


_MOST_CPU_DEVICES = 1024  # each has threads


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Sources: cloud.google.com/tpu/docs/v5e, /v5p and /v6e ("System architecture"), except for the memory: that
    is what the compiler grants a program, of the data sheet's 16 GB, 95 GiB and 32 GB.
    """

    name: str
    hbm_bytes: int
    flops_per_second: float  # bfloat16, dense
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # of one link, in one direction
    dcn_bytes_per_second: float  # a chip's share of the data-centre network, between slices
    n_dims: int  # of the torus; there are two links a dim
    ring_multiple: int  # a dim is closed to a ring where it is a multiple of this
    pod_chips: int

    def closes_to_rings(self, dims: tuple[int, ...]) -> tuple[bool, ...]:
        """Tells which dims of a slice wrap around.

        A v5e or v6e does where a dim spans the pod's 16 chips, a v5p in slices of whole cubes of 4 x 4 x 4
        (Austin et al. 2025, How to Scale Your Model, chapter 2).
        """
        whole = all(dim % self.ring_multiple == 0 for dim in dims)
        return tuple(dim % self.ring_multiple == 0 and (whole or self.n_dims == 2) for dim in dims)


# ICI: the data sheet's bidirectional bandwidth of a chip, over its links and two directions. DCN: of a pod,
# over its 256 chips (v5e 6.4 Tbit/s, v6e 25.6 Tbit/s); of a chip (v5p 50 Gbit/s).
CHIPS = {
    "v5e": Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 400e9 / 4 / 2, 6.4e12 / 256 / 8, 2, 16, 256),
    "v5p": Chip("v5p", int(95.73 * GIB), 459e12, 2765e9, 1200e9 / 6 / 2, 50e9 / 8, 3, 4, 8960),
    "v6e": Chip("v6e", int(31.24 * GIB), 918e12, 1638e9, 800e9 / 4 / 2, 25.6e12 / 256 / 8, 2, 16, 256),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str  # "v5e:16x16"
    devices: tuple[jax.Device, ...]
    chip: Chip | None  # None: virtual CPU devices, of which no data sheet speaks
    dims: tuple[int, ...]  # chips along each dim of one slice
    n_slices: int

    def link_bandwidth(self, group: tuple[jax.Device, ...]) -> float:
        """Bytes per second that a device can send to a group of its slice with a ring algorithm.

        Along each torus dim that the group spans, a closed ring sends both ways at once, a line one way;
        where the group takes every n-th chip of a dim, n groups share its links.
        """
        assert self.chip is not None
        rings = self.chip.closes_to_rings(self.dims)
        total = 0.0
        for dim, (size, ring) in enumerate(zip(self.dims, rings, strict=True)):
            places = sorted({device.coords[dim] for device in group})
            if len(places) > 1:
                whole_ring = ring and len(places) == size
                gap = 1 if whole_ring else (places[-1] - places[0]) / (len(places) - 1)
                total += (2 if whole_ring else 1) / gap
        return total * self.chip.link_bytes_per_second


def find(name: str, n_slices: int = 1) -> Topology:
    """Looks up "v5e:16x16", "v5p:4x4x4", "v6e:8x8", chips along dims of a slice; "cpu:8": virtual devices.

    The data-centre network joins the slices. UserError if the name is wrong, libtpu is missing or does not
    know it.
    """
    kind, _, shape = name.partition(":")
    if not re.fullmatch("[1-9][0-9]{0,4}(x[1-9][0-9]{0,4})*", shape) or kind not in (*CHIPS, "cpu"):
        raise UserError(f"--topology = {name}: must be like v5e:16x16, v5p:4x4x4, v6e:8x8 or cpu:8")
    if n_slices < 1:
        raise UserError(f"--slices = {n_slices}: must be 1 or more")
    dims = tuple(int(size) for size in shape.split("x"))
    if kind == "cpu":
        return Topology(name, _cpu_devices(name, math.prod(dims), n_slices), None, dims, 1)
    chip = CHIPS[kind]
    if len(dims) != chip.n_dims:
        raise UserError(f"--topology = {name}: a {kind} slice has {chip.n_dims} dims")
    if math.prod(dims) > chip.pod_chips:
        raise UserError(f"--topology = {name}: a {kind} pod has {chip.pod_chips} chips; use more --slices")
    return Topology(name, _tpu_devices(name, dims, n_slices), chip, dims, n_slices)


def _cpu_devices(name: str, n: int, n_slices: int) -> tuple[jax.Device, ...]:
    if n_slices > 1:
        raise UserError(f"--slices = {n_slices}: {name} has no slices; name a TPU topology")
    if n > _MOST_CPU_DEVICES:
        raise UserError(f"--topology = {name}: must be at most {_MOST_CPU_DEVICES} virtual devices")
    with contextlib.suppress(RuntimeError):  # it has its devices already: they will do if they are enough
        jax.config.update("jax_num_cpu_devices", n)
    devices = jax.devices("cpu")
    if len(devices) < n:
        raise UserError(f"--topology = {name}: this process has {len(devices)} CPU devices already")
    return tuple(devices[:n])


def _tpu_devices(name: str, dims: tuple[int, ...], n_slices: int) -> tuple[jax.Device, ...]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology = {name}: needs libtpu, which compiles for TPUs without one; run: "
            'pip install "topklm[tpu-compile]"'
        )
    for variable, value in _NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    options: dict = {"num_slices": n_slices} if n_slices > 1 else {}
    if math.prod(dims) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as e:
        raise UserError(f"--topology = {name}: libtpu does not know this slice: {e}") from e
    return tuple(description.devices)
