"""What can be captured of a forward pass, named as in TransformerLens.

Of layer l: `blocks.{l}.hook_resid_pre`, the residual stream that enters it; `blocks.{l}.hook_topk_pre`, what
its TopK is given, and `blocks.{l}.hook_topk`, what that keeps (TopK layers only);
`blocks.{l}.hook_resid_post`, what the layer hands on.
"""

from collections.abc import Callable, Sequence

from topklm.config import ModelConfig

RESID_PRE, TOPK_PRE, TOPK, RESID_POST = "hook_resid_pre", "hook_topk_pre", "hook_topk", "hook_resid_post"

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def of(layer: int, hook: str) -> str:
    """(3, "hook_topk") -> "blocks.3.hook_topk"."""
    return f"blocks.{layer}.{hook}"


def parse(name: str) -> tuple[int, str]:
    """The inverse of `of`."""
    _, layer, hook = name.split(".")
    return int(layer), hook


def there_are(config: ModelConfig) -> tuple[str, ...]:
    """All names of a model, in the order in which they are computed."""
    hooks = {True: (RESID_PRE, TOPK_PRE, TOPK, RESID_POST), False: (RESID_PRE, RESID_POST)}
    return tuple(
        of(layer, hook) for layer in range(config.n_layers) for hook in hooks[layer < config.n_topk_layers]
    )


def chosen(config: ModelConfig, names_filter: NamesFilter) -> tuple[str, ...]:
    """The names that a filter stands for, in the order of `there_are`.

    Args:
        config: The model.
        names_filter: A name, several, or a function that says of each whether it is wanted; None: what the
            TopK layers keep.

    Raises:
        ValueError: For a name that the model does not have.
    """
    names = there_are(config)
    if names_filter is None:
        return tuple(name for name in names if parse(name)[1] == TOPK)
    if callable(names_filter):
        return tuple(name for name in names if names_filter(name))
    wanted = {names_filter} if isinstance(names_filter, str) else set(names_filter)
    if unknown := sorted(wanted - set(names)):
        known = f"{names[0]} to {names[-1]}"
        raise ValueError(f"names_filter: {unknown[0]!r} is none of this model's names, which are {known}")
    return tuple(name for name in names if name in wanted)
