"""What a checkpoint is made of, for those who write one and those who read one.

A step's folder holds four Orbax items: `params` (nested dict of arrays), `optimizer`, `data` (JSON) and
`facts` (JSON: config, tokenizer sha256, step, tokens seen, seconds trained, versions).
"""

from typing import Any

import jax
import orbax.checkpoint as ocp

from topklm import sharding

PARAMS, OPTIMIZER, DATA, FACTS = "params", "optimizer", "data", "facts"


def restore_args(abstract: Any, mesh: jax.sharding.Mesh) -> ocp.args.PyTreeRestore:
    """What Orbax needs to read a tree onto a mesh: shapes, dtypes and the new layout of every leaf."""
    shardings = sharding.parameter_shardings(abstract, mesh)
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    return ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )


def mismatches(saved: Any, wanted: Any) -> list[str]:
    """Names every array that is missing, unexpected or of another shape, a short phrase each."""
    old, new = _shapes(saved), _shapes(wanted)
    problems = [f"{name} is missing" for name in new if name not in old]
    problems += [f"{name} is not part of this model" for name in old if name not in new]
    problems += [
        f"{name} is {list(old[name])}, this model needs {list(new[name])}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    return problems


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(entry.key) for entry in path): tuple(leaf.shape) for path, leaf in leaves}
