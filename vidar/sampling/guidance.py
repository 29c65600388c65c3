"""Guidance: a weighted sum of predictions under different dropped conditions.

Branches are folded into the batch, branch-major, and each keeps its own caches. This room must not know networks.
"""

from dataclasses import dataclass, replace
from functools import reduce

import jax
import jax.numpy as jnp

from vidar.attention.cache import ConditionCache
from vidar.errors import ConfigError, check_range
from vidar.models.frames import Conditions


@dataclass(frozen=True)
class Branch:
    """One term of the sum.

    Attributes:
        coefficient: Its weight.
        drops: Conditions dropped in it: `text`, `actions`, `label`.
    """

    coefficient: float = 1.0
    drops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_range("guidance.coefficient", self.coefficient)
        unknown = set(self.drops) - {"text", "actions", "label"}
        if unknown:
            raise ConfigError(f"guidance drops {sorted(unknown)}: only text, actions and label can be dropped")


Guidance = tuple[Branch, ...]
UNGUIDED: Guidance = (Branch(),)


def classifier_free(scale: float, drops: tuple[str, ...] = ("text", "actions", "label")) -> Guidance:
    """Classifier-free guidance (arXiv 2207.12598): `null + scale · (conditional - null)`.

    Args:
        scale: 1 is no guidance.
        drops: Conditions dropped in the null branch.

    Returns:
        The branches; one when the scale is 1.
    """
    return UNGUIDED if scale == 1.0 else (Branch(scale), Branch(1.0 - scale, drops))


def fold(conditions: Conditions, guidance: Guidance) -> Conditions:
    """Stacks the conditions of all branches along the batch; projected text must be stacked already."""
    if len(guidance) == 1 and not guidance[0].drops:
        return conditions
    text = conditions.text if isinstance(conditions.text, ConditionCache) else None
    bare = conditions if text is None else replace(conditions, text=None)
    rows = jax.tree.leaves(bare)[0].shape[0] if jax.tree.leaves(bare) else 0
    every = tuple(dict.fromkeys(name for branch in guidance for name in branch.drops))
    parts = [bare.drop(every, jnp.ones((rows,), bool)) for _ in guidance]
    parts = [part.drop(branch.drops, jnp.zeros((rows,), bool)) for part, branch in zip(parts, guidance, strict=True)]
    folded = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=0), *parts)
    return folded if text is None else replace(folded, text=text, text_kept=None)


def combine(predictions: jax.Array, guidance: Guidance) -> jax.Array:
    """Weighted sum over branches of `[branches · b, ...]`, in fp32."""
    if len(guidance) == 1:
        return predictions
    split = predictions.reshape(len(guidance), -1, *predictions.shape[1:])
    terms = [branch.coefficient * part for branch, part in zip(guidance, split, strict=True)]
    return reduce(jnp.add, terms)
