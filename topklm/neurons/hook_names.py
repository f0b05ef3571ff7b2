"""The arrays of a forward pass that can be captured, named as in TransformerLens.

Of layer l: `blocks.{l}.hook_resid_pre`, the residual stream that enters it; `blocks.{l}.hook_topk_pre`, what
its TopK is given, and `blocks.{l}.hook_topk`, what that keeps (TopK layers only);
`blocks.{l}.hook_resid_post`, the output of the layer. That is the output of its TopK, too, and the input of
the next layer, so some names are of the same array.
"""

from collections.abc import Callable, Sequence
import difflib

from topklm.config import ModelConfig
from topklm.errors import one_line

RESID_PRE, TOPK_PRE, TOPK, RESID_POST = "hook_resid_pre", "hook_topk_pre", "hook_topk", "hook_resid_post"

_CLOSE = 3  # names that an error message offers

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def name(layer: int, hook: str) -> str:
    """Returns the full name: (3, "hook_topk") -> "blocks.3.hook_topk"."""
    return f"blocks.{layer}.{hook}"


def parse(hook_name: str) -> tuple[int, str]:
    """Returns the inverse of `name`."""
    _, layer, hook = hook_name.split(".")
    return int(layer), hook


class HookName(str):
    """A name as functions of hooks get it, also with the parts that it has in TransformerLens."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """Returns the name itself."""
        return str(self)

    def layer(self) -> int:
        """Returns the number of its layer."""
        return parse(self)[0]


def same_array(hook_name: str) -> str:
    """Returns the one name of all those that are of the same array, of names that a model has."""
    layer, hook = parse(hook_name)
    if hook == RESID_PRE and layer > 0:
        return name(layer - 1, RESID_POST)
    return name(layer, RESID_POST if hook == TOPK else hook)


def all_names(config: ModelConfig) -> tuple[str, ...]:
    """Returns all names of a model, in the order in which they are computed."""
    hooks = {True: (RESID_PRE, TOPK_PRE, TOPK, RESID_POST), False: (RESID_PRE, RESID_POST)}
    return tuple(
        name(layer, hook) for layer in range(config.n_layers) for hook in hooks[layer < config.n_topk_layers]
    )


def matching(config: ModelConfig, names_filter: NamesFilter) -> tuple[str, ...]:
    """Returns the names that a filter stands for, in the order of `all_names`.

    Args:
        config: The model.
        names_filter: A name, several, or a function that says of each whether it is wanted; None: the
            outputs of TopK layers.

    Raises:
        ValueError: For a name that the model does not have, or what is no filter.
    """
    names = all_names(config)
    if names_filter is None:
        return tuple(each for each in names if parse(each)[1] == TOPK)
    if callable(names_filter):
        return tuple(each for each in names if names_filter(each))
    try:
        wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    except TypeError:
        raise ValueError(
            f"names_filter = {names_filter!r}: must be a name, several, or a function of a name"
        ) from None
    for each in wanted:
        check(config, each, "names_filter")
    return tuple(each for each in names if each in wanted)


def check(config: ModelConfig, given: object, field: str) -> None:
    """Raises ValueError, with names that are close, for one that the model does not have."""
    names = all_names(config)
    if not isinstance(given, str) or given not in names:
        close = ", ".join(difflib.get_close_matches(str(given), names, _CLOSE, cutoff=0))
        raise ValueError(
            one_line(
                f"{field}: {given!r} is none of this model's names; close: {close} (all: model.hook_names)"
            )
        )
