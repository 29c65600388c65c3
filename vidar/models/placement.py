"""Where the parameters of transformers lie: one table from names to logical axes, and gathering them for a product.

Shardings and checkpoint templates follow from the table (`vidar/sharding.py`). It knows names, not networks.
"""

from typing import Any

import jax

from vidar.sharding import shardings

_KERNELS = {
    "patch": (None, "embed"),
    "time.inner": (None, "embed"),
    "time.outer": ("embed", None),
    "time_projection": ("embed", None),
    "actions.inner": (None, "embed"),
    "actions.outer": (None, "embed"),
    "image.inner": (None, "embed"),
    "image.outer": (None, "embed"),
    "text_inner": (None, "embed"),
    "text_outer": ("embed", None),
    "query": ("embed", "heads"),
    "key": ("embed", "heads"),
    "value": ("embed", "heads"),
    "output": ("heads", "embed"),
    "up": ("embed", "mlp"),
    "gate": ("embed", "mlp"),
    "down": ("mlp", "embed"),
    "projection": ("embed", None),
    "head": ("embed", None),
}
_BIASES = {"query": ("heads",), "key": ("heads",), "value": ("heads",), "up": ("mlp",)}


def gathered(part: Any) -> Any:
    """Parameters gathered along `embed`, as products want them; stacked blocks wait until they are sliced.

    Left to itself, the partitioner may split a product over mesh axes on which its rows lie already; where all four
    axes are 2, XLA then computes wrong gradients (jax 0.10.2).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return part

    def axes(path: str, leaf: Any) -> tuple[str | None, ...]:
        names = logical_axes(path, leaf)
        return names if "layers" in names else tuple(None if name == "embed" else name for name in names)

    return jax.lax.with_sharding_constraint(part, shardings(part, axes, mesh))


def logical_axes(path: str, leaf: Any) -> tuple[str | None, ...]:
    """Logical axes of one parameter.

    Args:
        path: Its path, such as `.blocks.attention.query.kernel.value`.
        leaf: The array, or anything with an `ndim`.

    Returns:
        One logical axis name, or None for replicated, per dimension.
    """
    # Adapters are kept by path: their own path is that one in quotes.
    path = path.removeprefix("['").removesuffix("']")
    names = [name for name in path.removesuffix(".value").split(".") if name]
    if names[-1] in ("lora_in", "lora_out"):
        *stack, first, last = logical_axes(".".join([*names[:-1], "kernel"]), leaf)
        return (*stack, first, None) if names[-1] == "lora_in" else (*stack, None, last)
    stacked = "blocks" in names
    rank = leaf.ndim - stacked
    axes: tuple[str | None, ...] = (None,) * rank
    table = _KERNELS if names[-1] == "kernel" else _BIASES if names[-1] == "bias" else {}
    for owner in (".".join(names[-3:-1]), names[-2] if len(names) > 1 else ""):
        if owner in table and len(table[owner]) == rank:
            axes = table[owner]
            break
    return ("layers", *axes) if stacked else axes
