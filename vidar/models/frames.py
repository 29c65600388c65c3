"""What goes into a network: frames of a stream, and conditions.

Dimension letters: b batch, f frames, h w latent height and width, c channels, s text tokens, k action channels.
This room must not know networks or objectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from vidar.attention.cache import ConditionCache
from vidar.attention.visibility import Layout
from vidar.errors import ConfigError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["latents", "level", "time", "start", "active"],
    meta_fields=["layout"],
)
@dataclass(frozen=True)
class Frames:
    """One stream of frames.

    Attributes:
        latents: `[b, f, h, w, c]`.
        level: Noise level of each frame in [0, 1], `[b, f]`.
        layout: Static offsets, chunks and roles of the frames.
        time: What the network is told, `[b, f]`; None for 1000 · level.
        start: Absolute frame of the stream's offset 0, `[b]`; None for 0.
        active: Frames that exist, `[b, f]`; None for all. Others are computed and ignored.
    """

    latents: jax.Array
    level: jax.Array
    layout: Layout
    time: jax.Array | None = None
    start: jax.Array | None = None
    active: jax.Array | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["text", "actions", "label", "image", "latents", "negative", "actions_kept", "label_kept", "text_kept"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Conditions:
    """Everything besides the past that frames depend on; each field may be None.

    Attributes:
        text: Text states `[b, s, c]`, or their projected keys and values.
        actions: Action on the way into each frame: int32 `[b, f]`, bool `[b, f, k]` or float32 `[b, f, k]`.
        label: Class of the video, int32 `[b]`.
        image: Features of an image `[b, s, c]`; with projected text, they are projected with it.
        latents: Further latents that each frame is given beside its own, `[b, f, h, w, c]`.
        negative: Text states that stand for dropped text `[b, s, c]`, a negative prompt's; None for all zeros.
        actions_kept: Rows whose actions are not dropped, bool `[b]`; None for all.
        label_kept: Rows whose label is not dropped, bool `[b]`; None for all.
        text_kept: Rows whose text is not dropped, bool `[b]`; None for all.
    """

    text: jax.Array | ConditionCache | None = None
    actions: jax.Array | None = None
    label: jax.Array | None = None
    image: jax.Array | None = None
    latents: jax.Array | None = None
    negative: jax.Array | None = None
    actions_kept: jax.Array | None = None
    label_kept: jax.Array | None = None
    text_kept: jax.Array | None = None

    def drop(self, names: Sequence[str], kept: jax.Array) -> "Conditions":
        """Drops conditions of some rows.

        Args:
            names: Fields to drop: `text`, `actions`, `label`; absent ones are ignored.
            kept: Rows that keep them, bool `[b]`.

        Returns:
            The conditions with their `kept` masks narrowed.
        """
        changes: dict[str, Any] = {}
        for name in names:
            if getattr(self, name) is None:
                continue
            before = getattr(self, f"{name}_kept")
            changes[f"{name}_kept"] = kept if before is None else before & kept
        return replace(self, **changes)

    def frames(self, start: int, stop: int) -> "Conditions":
        """Conditions of frames `start:stop`."""
        parts = {name: getattr(self, name) for name in ("actions", "latents")}
        return replace(self, **{name: None if part is None else part[:, start:stop] for name, part in parts.items()})

    def frames_at(self, start: jax.Array, count: int) -> "Conditions":
        """Conditions of `count` frames from one that is known only when it runs, int32 scalar."""

        def part(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)

        return replace(self, actions=part(self.actions), latents=part(self.latents))


@partial(jax.tree_util.register_dataclass, data_fields=["latents", "conditions", "index", "trajectory"], meta_fields=[])
@dataclass(frozen=True)
class Batch:
    """A batch of clips as objectives see it.

    Attributes:
        latents: Clean latents `[b, f, h, w, c]`; None where there are prompts alone.
        conditions: Their conditions.
        index: Global sample index of each clip, int32 `[b]`, from which training keys derive.
        trajectory: States of a teacher on its way to these latents, `[b, k, f, h, w, c]`, at the levels of the
            student's solver in their order; None where the data has none.
    """

    latents: Any
    conditions: Conditions
    index: jax.Array
    trajectory: jax.Array | None = None


def row_labels(label: ArrayLike | None, classes: int | None, rows: int) -> np.ndarray | None:
    """Checks the class labels that a person gives.

    Args:
        label: One label for all rows, one a row `[b]`, or None.
        classes: Number of classes that the network knows, or None.
        rows: Rows b.

    Returns:
        int32 `[b]`, or None for networks without classes.

    Raises:
        ConfigError: There is no label where there should be one, one where there should not, or an impossible one.
    """
    if classes is None:
        if label is not None:
            raise ConfigError("a label was given, but the network has no classes (model.classes is not set)")
        return None
    if label is None:
        raise ConfigError(f"the network makes videos of a class: give a label (--label), 0 … {classes - 1}")
    array = np.asarray(label)
    known = array.dtype.kind in "iu" and bool(np.all((array >= 0) & (array < classes)))
    if not known or array.shape not in ((), (rows,)):
        raise ConfigError(f"label={label} should be the class of each of {rows} videos: 0 … {classes - 1}")
    return np.ascontiguousarray(np.broadcast_to(array.astype(np.int32), (rows,)))


def repeat_rows(tree: Any, times: int) -> Any:
    """Repeats the batch axis: branch-major rows, for folding guidance branches into the batch."""
    return jax.tree.map(lambda x: jnp.concatenate([x] * times, axis=0) if times > 1 else x, tree)
