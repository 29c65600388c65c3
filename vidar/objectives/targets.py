"""Pure pieces of losses: per-clip keys and draws, regression losses, level buckets, the DMD gradient.

Nothing here knows networks; everything is testable on random arrays. Letters as in `models/frames.py`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from vidar.attention.visibility import Layout
from vidar.diffusion.levels import Levels, LevelsConfig
from vidar.models.frames import Conditions

BUCKETS = 8
"""Level buckets of equal width in which losses are reported."""


def clip_keys(key: PRNGKeyArray, index_b: Int[Array, " b"]) -> Key[Array, " b"]:
    """Keys `[b]` from a step's key and the global sample index of each clip."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_b)


def clip_noise(key_b: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Standard normal noise of `shape` for each clip."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(key_b)


def fold_each(key_b: Key[Array, " b"], data: int | jax.Array) -> Key[Array, " b"]:
    """Folds a number into each clip's key."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(key_b)


def frame_levels(config: LevelsConfig, key_b: Key[Array, " b"], layout: Layout) -> Levels:
    """Draws training levels per chunk and spreads them over the frames of a layout.

    Args:
        config: The law of the levels.
        key_b: Key of each clip.
        layout: Frames and their chunks.

    Returns:
        Levels, clean flags and loss flags `[b, f]`.
    """
    chunks = layout.chunks[-1] + 1
    drawn = jax.vmap(lambda key: config.sample(key, 1, chunks))(key_b)
    chunk_of = jnp.asarray(layout.chunks, jnp.int32)
    return Levels(*(value[:, 0][:, chunk_of] for value in drawn))


def drop_some(conditions: Conditions, key_b: Key[Array, " b"], probability: float) -> Conditions:
    """Drops all conditions of a clip together with some probability, for classifier-free guidance."""
    if probability == 0.0:
        return conditions
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - probability))(key_b)
    return conditions.drop(("text", "actions", "label"), kept)


def trajectory_states(
    trajectory: Float[Array, "b k f h w c"], index_bf: Int[Array, "b f"]
) -> Float[Array, "b f h w c"]:
    """Takes for each frame one of its states on a teacher's trajectory.

    Args:
        trajectory: States, from the noisiest to the clean one.
        index_bf: Which state of each frame, in [0, k).

    Returns:
        The frames, each in its state.
    """
    return jnp.take_along_axis(trajectory, index_bf[:, None, :, None, None, None], axis=1)[:, 0]


def masked_mean(error_bf: Float[Array, "b f"], mask_bf: Float[Array, "b f"] | Bool[Array, "b f"]) -> Float[Array, ""]:
    """Mean of per-frame errors over the frames whose mask is set; 0 where none is."""
    weight = mask_bf.astype(jnp.float32)
    return jnp.sum(error_bf * weight) / jnp.maximum(jnp.sum(weight), 1.0)


def frame_error(prediction: Float[Array, "b f h w c"], target: Float[Array, "b f h w c"]) -> Float[Array, "b f"]:
    """Mean squared error of each frame, in fp32."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)), axis=(2, 3, 4))


def level_buckets(
    error_bf: Float[Array, "b f"], level_bf: Float[Array, "b f"], mask_bf: Bool[Array, "b f"]
) -> dict[str, jax.Array]:
    """Sums and counts of per-frame errors by level, for the log to divide.

    Args:
        error_bf: Error of each frame.
        level_bf: Level of each frame.
        mask_bf: Frames that carry loss.

    Returns:
        `loss_level/<lower bound>:sum` and `:count` for each of `BUCKETS` buckets.
    """
    bucket = jnp.clip((level_bf * BUCKETS).astype(jnp.int32), 0, BUCKETS - 1)
    metrics = {}
    for index in range(BUCKETS):
        chosen = (mask_bf & (bucket == index)).astype(jnp.float32)
        name = f"loss_level/{index / BUCKETS:.3f}"
        metrics[f"{name}:sum"] = jnp.sum(error_bf * chosen)
        metrics[f"{name}:count"] = jnp.sum(chosen)
    return metrics


def dmd_direction(
    x: Float[Array, "b f h w c"],
    fake: Float[Array, "b f h w c"],
    real: Float[Array, "b f h w c"],
    mask_f: Bool[Array, " f"],
) -> Float[Array, "b f h w c"]:
    """Normalised difference of the critic's and the teacher's clean predictions (DMD, arXiv 2311.18828, eq. 8).

    Args:
        x: Generated clean frames.
        fake: Clean prediction of the critic.
        real: Guided clean prediction of the teacher.
        mask_f: Frames that were generated (given ones carry no loss).

    Returns:
        `(fake - real) / mean|x - real|`, the mean per clip over generated frames; non-finite values become 0.
    """
    weight = mask_f.astype(jnp.float32)[None, :, None, None, None]
    size = x[0].size // x.shape[1]
    scale = jnp.sum(jnp.abs(x - real) * weight, axis=(1, 2, 3, 4), keepdims=True) / (jnp.sum(weight) * size)
    direction = (fake - real) / scale * weight
    return jnp.where(jnp.isfinite(direction), direction, 0.0)


def pull(
    x: Float[Array, "b f h w c"], direction: Float[Array, "b f h w c"], count: float | Float[Array, ""]
) -> Float[Array, ""]:
    """Scalar whose gradient with respect to `x` is `direction / count` (the DMD surrogate loss).

    Args:
        x: Differentiable generated frames.
        direction: Where to move away from.
        count: Number of elements that carry loss.

    Returns:
        Half the summed squared distance to the moved target, over `count`.
    """
    goal = jax.lax.stop_gradient(x - direction)
    return 0.5 * jnp.sum(jnp.square(x - goal)) / count


def counted(video: Float[Array, "b f h w c"], mask_f: Bool[Array, " f"]) -> Float[Array, ""]:
    """Number of elements of a video's frames that carry loss."""
    return jnp.sum(mask_f.astype(jnp.float32)) * video[:, :1].size


def sid_loss(
    x: Float[Array, "b f h w c"],
    fake: Float[Array, "b f h w c"],
    real: Float[Array, "b f h w c"],
    mask_f: Bool[Array, " f"],
    alpha: float,
) -> Float[Array, ""]:
    """Score identity loss (SiD, arXiv 2404.04057, eq. 23, on clean predictions).

    Args:
        x: Generated clean frames.
        fake: Clean prediction of the critic, differentiable in `x`.
        real: Guided clean prediction of the teacher, likewise.
        mask_f: Frames that were generated.
        alpha: Weight of the squared difference that is taken off.

    Returns:
        Mean of `(real - fake) ((real - x) - alpha (real - fake)) / mean|x - real|`, the divisor per clip and cut.
    """
    weight = mask_f.astype(jnp.float32)[None, :, None, None, None]
    per_clip = jnp.sum(weight) * (x[0].size // x.shape[1])
    scale = jax.lax.stop_gradient(jnp.sum(jnp.abs(x - real) * weight, axis=(1, 2, 3, 4)) / per_clip)
    apart = real - fake
    loss = jnp.sum(apart * ((real - x) - alpha * apart) * weight, axis=(1, 2, 3, 4)) / per_clip
    return jnp.mean(loss / jnp.maximum(scale, 1e-8))


def generator_loss(fake_b: Float[Array, " b"], real_b: Float[Array, " b"] | None) -> Float[Array, ""]:
    """The generator's side of a softplus GAN.

    Args:
        fake_b: Logits of generated videos.
        real_b: Logits of data, where a video is judged relative to one of data (arXiv 1807.00734); None by itself.

    Returns:
        Mean loss.
    """
    return jnp.mean(jax.nn.softplus(-(fake_b if real_b is None else fake_b - real_b)))


def discriminator_loss(
    fake_b: Float[Array, " b"], real_b: Float[Array, " b"], *, relativistic: bool
) -> Float[Array, ""]:
    """The discriminator's side of a softplus GAN; arguments as `generator_loss`."""
    if relativistic:
        return jnp.mean(jax.nn.softplus(-(real_b - fake_b)))
    return jnp.mean(jax.nn.softplus(-real_b)) + jnp.mean(jax.nn.softplus(fake_b))


def shift_against_data(
    video: Float[Array, "b f h w c"], data: Float[Array, "b g h w c"], mask_f: Bool[Array, " f"]
) -> dict[str, jax.Array]:
    """How far generated latents have moved from data as a whole: the first signs of a collapse or of over-saturation.

    Args:
        video: Generated clips.
        data: Clips of data; their number of frames may differ.
        mask_f: Frames that were generated.

    Returns:
        `colour_shift`, the mean distance between channel means in deviations of the data; and `contrast`, the ratio of
        deviations, 1 where they are alike.
    """
    weight = mask_f.astype(jnp.float32)[None, :, None, None, None]
    video = jax.lax.stop_gradient(video)
    mean = jnp.sum(video * weight, axis=(0, 1, 2, 3)) / (jnp.sum(weight) * (video[:, 0, ..., 0].size))
    centred = (video - mean[None, None, None, None]) * weight
    deviation = jnp.sqrt(jnp.sum(jnp.square(centred)) / (jnp.sum(weight) * video[:, 0].size))
    data_mean = jnp.mean(data, axis=(0, 1, 2, 3))
    data_deviation = jnp.sqrt(jnp.mean(jnp.square(data - data_mean[None, None, None, None])))
    return {
        "colour_shift": jnp.mean(jnp.abs(mean - data_mean)) / data_deviation,
        "contrast": deviation / data_deviation,
    }
