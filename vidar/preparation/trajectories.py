"""Teacher trajectories: what a trained network's deterministic sampler passes on its way from noise to clean latents.

A student of few steps learns from the states at its own levels, so these must be levels of the teacher's grid bit for
bit. The teacher generates whole clips, or chunk by chunk through its cache. This room must not know data sets; it takes
a built network, a sampler, and conditions as arrays.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidar.attention.visibility import chunk_layout
from vidar.data.trajectories import TrajectoryWriter
from vidar.diffusion import flow
from vidar.errors import ConfigError
from vidar.models.frames import Conditions, Frames, repeat_rows
from vidar.sampling.guidance import Guidance, combine, fold
from vidar.sampling.noise import Purpose, frame_noise
from vidar.sampling.rollout import Sampler
from vidar.sampling.solvers import Euler, FewStep, level_table
from vidar.sampling.trajectory import chunk_by_chunk

Progress = Callable[[Sequence[Any]], Iterable[Any]]
_MOST_STEPS = 1000


def kept_steps(times: Sequence[float], shift: float, steps: int) -> tuple[int, ...]:
    """Finds a few-step student's levels on its teacher's grid.

    Args:
        times: The student's descending times in (0, 1000], before the warp; a final 0 is not listed.
        shift: Time shift of student and teacher.
        steps: The teacher's steps.

    Returns:
        Steps that the teacher has taken at each of the student's levels, the last one at level 0.

    Raises:
        ConfigError: A level of the student's is not one of the teacher's, bit for bit in float32.
    """
    wanted = level_table(FewStep(tuple(map(float, times)), shift))
    grid = level_table(Euler(steps, shift)).tolist()
    lacking = [time for time, level in zip(times, wanted.tolist(), strict=False) if level not in grid]
    if not lacking:
        return tuple(grid.index(level) for level in wanted.tolist())
    every = (count for count in range(1, _MOST_STEPS + 1) if np.isin(wanted, level_table(Euler(count, shift))).all())
    fits = sorted(sorted(every, key=lambda count: abs(count - steps))[:3])
    hint = f"{' or '.join(map(str, fits))} would hit them" if fits else f"no count up to {_MOST_STEPS} hits them"
    listed = ", ".join(f"{time:g}" for time in times)
    raise ConfigError(f"{steps} steps at shift {shift:g} do not pass time {lacking[0]:g} of {listed} exactly: {hint}")


def teacher_sampler(sampler: Sampler, steps: int, shift: float, guidance: Guidance | None = None) -> Sampler:
    """A trained system's sampler as a teacher: deterministic Euler steps, whole clips or one chunk after the other.

    Args:
        sampler: The system's sampler.
        steps: Euler steps.
        shift: Time shift of their grid.
        guidance: Branches; None for the system's own.

    Returns:
        The sampler; chunks enter the cache by a pass of their own, at the system's level.
    """
    return replace(
        sampler,
        solver=Euler(steps, shift),
        lag=None if sampler.program.lag else 0,
        commit=replace(sampler.commit, kind="extra_pass"),
        guidance=sampler.guidance if guidance is None else guidance,
    )


def integrate(
    sampler: Sampler,
    kept: tuple[int, ...],
    network: Any,
    key_b: jax.Array,
    conditions: Conditions,
    given: jax.Array | None = None,
) -> jax.Array:
    """Generates clips and keeps some of the states on the way.

    Args:
        sampler: From `teacher_sampler`.
        kept: Numbers of steps after which the state is kept, ascending.
        network: The teacher.
        key_b: Session keys `[b]`.
        conditions: Conditions of all frames.
        given: Clean latents of the first frames `[b, f, h, w, c]`; they are clean in every state. A teacher of whole
            clips sees them at level 0.

    Returns:
        States `[b, k, f, h, w, c]`, fp32.

    Raises:
        ConfigError: The given frames are not whole chunks, or leave none to generate.
    """
    if given is not None and given.shape[1] >= sampler.frames:
        raise ConfigError(f"{given.shape[1]} given frames leave none of {sampler.frames} to generate")
    conditions = sampler.encode(network, conditions)
    integrated = chunk_by_chunk if sampler.program.lag else _whole_clips
    return integrated(sampler, kept, network, key_b, conditions, given)


def _whole_clips(
    sampler: Sampler, kept: tuple[int, ...], network: Any, key_b: jax.Array, conditions: Conditions, given: Any
) -> jax.Array:
    frames, rows = sampler.frames, key_b.shape[0]
    known = 0 if given is None else given.shape[1]
    frame = jnp.broadcast_to(jnp.arange(frames, dtype=jnp.int32)[None], (rows, frames))
    x = frame_noise(key_b, Purpose.INITIAL, frame, jnp.zeros((frames,), jnp.int32), sampler.latent)
    if given is not None:
        x = jnp.concatenate([given, x[:, known:]], axis=1)
    layout = chunk_layout(frames, sampler.chunk, independent_first_frame=sampler.first)
    table, folded = jnp.asarray(level_table(sampler.solver)), fold(conditions, sampler.guidance)

    def step(index: jax.Array, x: jax.Array) -> jax.Array:
        level, after = (jnp.where(frame < known, 0.0, table[at]) for at in (index, index + 1))
        seen = repeat_rows(Frames(x, level, layout), len(sampler.guidance))
        output = network((seen,), folded, visibility=sampler.visibility).predictions[0]
        velocity = flow.to_velocity(network.config.prediction, combine(output, sampler.guidance), x, level)
        return x + flow.per_frame(after - level, x) * velocity

    # One loop body for all stretches between kept states, so that the network is compiled once.
    stretches = jnp.asarray(list(pairwise((0, *kept))), jnp.int32)

    def stretch(x: jax.Array, ends: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.lax.fori_loop(ends[0], ends[1], step, x)
        return x, x

    _, states = jax.lax.scan(stretch, x, stretches)
    return jnp.moveaxis(states, 0, 1)


@partial(jax.jit, static_argnums=(0, 1))
def _integrate(
    sampler: Sampler, kept: tuple[int, ...], network: Any, key_b: jax.Array, conditions: Conditions, given: Any
) -> jax.Array:
    return integrate(sampler, kept, network, key_b, conditions, given)


@dataclass(frozen=True)
class Teacher:
    """Clips to trajectories, always of as many clips at once, so that all of them run one executable.

    Attributes:
        network: The network; its weights may lie on several devices.
        sampler: From `teacher_sampler`.
        kept: From `kept_steps`.
        rows: Clips that are integrated at once.
        seed: Each clip's noise follows from it and the clip's number alone.
    """

    network: Any
    sampler: Sampler
    kept: tuple[int, ...]
    rows: int
    seed: int = 0

    def __call__(
        self, numbers: Sequence[int], conditions: Conditions, given: jax.Array | np.ndarray | None = None
    ) -> np.ndarray:
        """Integrates clips.

        Args:
            numbers: Numbers of the clips, at most `rows`.
            conditions: Their conditions, of all frames.
            given: Clean latents of their first frames, or None.

        Returns:
            States `[b, k, f, h, w, c]`, fp32.
        """
        root, missing = jax.random.key(self.seed % 2**32), self.rows - len(numbers)
        padded = jnp.asarray([*numbers, *[0] * missing], jnp.uint32)
        key_b = jax.vmap(partial(jax.random.fold_in, root))(padded)

        def fill(x: Any) -> jax.Array:
            return jnp.concatenate([jnp.asarray(x), jnp.repeat(jnp.asarray(x[-1:]), missing, axis=0)])

        conditions, given = jax.tree.map(fill, (conditions, given))
        return np.asarray(_integrate(self.sampler, self.kept, self.network, key_b, conditions, given))[: len(numbers)]


def prepare(
    writer: TrajectoryWriter,
    make: Callable[[Sequence[int]], Mapping[str, Any]],
    part: int = 0,
    parts: int = 1,
    progress: Progress = iter,
) -> None:
    """Writes the shards that are missing.

    Args:
        writer: Writes them.
        make: From the numbers of a shard's clips to what `TrajectoryWriter.write` takes; it must depend on nothing
            else, so that an interrupted preparation ends in the same bits.
        part: This process, in [0, parts); each writes its own shards.
        parts: Number of processes.
        progress: Wraps the list of shards to be written, such as `tqdm`.
    """
    for number in progress(writer.missing(part, parts)):
        writer.write(number, make(writer.form.numbers(number)))


def fingerprint(network: Any) -> str:
    """Tells weights apart: a digest of every parameter's name, type, shape and bits."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(network)[0]:
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:32]


def clip_order(available: int, clips: int, seed: int) -> np.ndarray:
    """Chooses clips of a data set: each once in random order, then each once more in another.

    Args:
        available: Clips of the data set.
        clips: How many are wanted.
        seed: Seed of the orders.

    Returns:
        int64 `[clips]`, numbers in [0, available).
    """
    rounds = range(-(-clips // available))
    orders = [np.random.default_rng((seed, number)).permutation(available) for number in rounds]
    return np.concatenate(orders)[:clips]
