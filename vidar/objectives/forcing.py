"""Where the videos come from that a student is distilled on: its own rollouts, or one parallel pass over data.

Each forcing turns a batch into videos that are differentiable in the student, and says which of their frames count. It
must not know what the videos are compared with.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from vidar.attention.visibility import CLEAN, Layout, Without
from vidar.diffusion import flow
from vidar.errors import check_range
from vidar.models.frames import Batch, Conditions, Frames
from vidar.objectives import targets
from vidar.sampling.axes import Axes
from vidar.sampling.flight import Gradient
from vidar.sampling.solvers import level_table
from vidar.sampling.trajectory import chunk_by_chunk


@partial(
    jax.tree_util.register_dataclass, data_fields=["video", "conditions", "metrics", "start"], meta_fields=["given"]
)
@dataclass(frozen=True)
class Generated:
    """Videos of a student.

    Attributes:
        video: `[b, f, h, w, c]`, differentiable in the student.
        conditions: Conditions of these frames.
        metrics: Scalars for the log.
        given: First frames, which are context: they carry no loss, and whoever judges the video sees them clean.
        start: Frame of the data at which these conditions begin, int32 scalar; None for the first.
    """

    video: jax.Array
    conditions: Conditions
    metrics: dict[str, jax.Array]
    given: int = 0
    start: jax.Array | None = None

    @property
    def counts(self) -> jax.Array:
        """Frames that carry loss, bool `[f]`."""
        return jnp.arange(self.video.shape[1]) >= self.given


@dataclass(frozen=True)
class SelfForcing:
    """The student's own rollouts through the cache, as at inference (Self Forcing, arXiv 2506.08009).

    A random exit row is the last solver step of a chunk; the context is encoded again from what left there.

    Attributes:
        given: First chunks of each clip that are taken from data instead of generated.
        frames: Frames of a rollout, given ones included; None for those of a training clip. Of a longer one, a clip at
            a random place is compared, and only it is differentiated (Self-Forcing++, LongLive).
        exit: Whether one exit row is drawn for all chunks (`"shared"`) or one for each (`"per_chunk"`).
        gradient: What of a rollout is differentiated.
        last_without_first: Whether the last chunk is generated without the first one in view, which for Wan is unlike
            all others and leaves the window of a longer video (the remedy of Self Forcing, section 3.4).
    """

    kind: ClassVar[str] = "self"
    given: int = 0
    frames: int | None = None
    exit: Literal["shared", "per_chunk"] = "shared"
    gradient: Gradient = Gradient()
    last_without_first: bool = False

    def __post_init__(self) -> None:
        check_range("forcing.given", self.given, least=0)
        check_range("forcing.frames", self.frames, least=1)

    @property
    def needs_clips(self) -> bool:
        """Whether clips of data are needed beside their conditions."""
        return self.given > 0

    def generate(self, student: Any, batch: Batch, axes: Axes, key: jax.Array, key_b: jax.Array) -> Generated:
        """Generates a clip for each clip of the batch.

        Args:
            student: The network.
            batch: Conditions, and data for the given chunks.
            axes: The system's axes.
            key: Key of the step, shared by all clips and devices.
            key_b: Keys of the clips.

        Returns:
            The videos, of the training clip's length.
        """
        sampler = axes.sampler
        frames, given = axes.sampler.frames, self.given_frames(axes)
        chunks = (frames - given) // sampler.chunk
        # One for all devices: drawn from what no clip has a part in.
        drawn = () if self.exit == "shared" else (chunks,)
        exit_rows = jax.random.randint(jax.random.fold_in(key, 2**31 - 1), drawn, 0, sampler.solver.steps)
        exit_rows = jnp.broadcast_to(exit_rows, (chunks,))
        # The clip that is compared begins this many chunks after the given ones.
        most = ((self.frames or frames) - frames) // sampler.chunk
        skipped = jax.random.randint(jax.random.fold_in(key, 2**31 - 2), (), 0, most + 1)
        video, metrics = self.rollout(student, batch, axes, key_b, exit_rows, skipped), {}
        metrics["exit_row"] = jnp.mean(exit_rows.astype(jnp.float32))
        if not most:
            return Generated(video, batch.conditions.frames(0, frames), metrics, given)
        start = skipped * sampler.chunk
        metrics["clip_start"] = start.astype(jnp.float32)
        return Generated(video, batch.conditions.frames_at(start, frames), metrics, given, start)

    def rollout(
        self, student: Any, batch: Batch, axes: Axes, key_b: jax.Array, exit_rows: jax.Array, skipped: jax.Array
    ) -> jax.Array:
        """One clip of each rollout, as long as a training clip.

        Args:
            student: The network.
            batch: Conditions, and data for the given chunks.
            axes: The system's axes.
            key_b: Session keys.
            exit_rows: For each generated chunk of the clip, the solver step whose clean prediction counts, int32.
            skipped: Chunks between the given ones and those of the clip, int32 scalar.

        Returns:
            Video `[b, f, h, w, c]`, differentiable in the student; its first frames are the given ones, or those
            generated before the clip.
        """
        sampler, given = axes.sampler, self.given_frames(axes)
        rows = batch.index.shape[0]
        before = batch.latents[:, :given] if given else jnp.zeros((rows, 0, *sampler.latent), jnp.float32)
        conditions = sampler.encode(student, batch.conditions)
        long = self.frames is not None and self.frames > sampler.frames
        # Rollouts hold all of their frames, whatever the clips' length.
        sampler = replace(sampler, frames=self.frames) if long and sampler.context.window is None else sampler
        state = sampler.init(student, key_b, actions=conditions.actions, in_step=True)
        if given:
            frozen = jax.lax.stop_gradient(student)
            state = sampler.prefill(frozen, state, before, conditions.frames(0, given))
        chunks, start = len(exit_rows), jnp.int32(given)
        if long:
            frozen, constant = jax.lax.stop_gradient((student, conditions))
            later = constant.frames(given, self.frames or 0)
            state, before = jax.lax.stop_gradient(sampler.advance(frozen, state, later, skipped, before))
            start = start + skipped * sampler.chunk
        conditions = conditions.frames_at(start, chunks * sampler.chunk)
        rollout = partial(sampler.rollout, gradient=self.gradient)
        if not self.last_without_first or chunks == 1:
            _, video = rollout(student, state, conditions, chunks, exit_rows=exit_rows)
            return jnp.concatenate([before, video], axis=1)
        edge = (chunks - 1) * sampler.chunk
        state, video = rollout(student, state, conditions.frames(0, edge), chunks - 1, exit_rows=exit_rows[:-1])
        first = 1 if sampler.first else sampler.chunk
        blind = replace(sampler, visibility=sampler.visibility & Without(first))
        last = conditions.frames(edge, chunks * sampler.chunk)
        _, end = blind.rollout(student, state, last, 1, exit_rows=exit_rows[-1:], gradient=self.gradient)
        return jnp.concatenate([before, video, end], axis=1)

    def given_frames(self, axes: Axes) -> int:
        """Frames taken from data."""
        if axes.sampler.first:
            return 1 + max(0, self.given - 1) * axes.sampler.chunk
        return self.given * axes.sampler.chunk


@dataclass(frozen=True)
class _Parallel:
    """One pass over clips that are noised to levels of the solver, each chunk to its own.

    Attributes:
        given: First chunks of each clip that stay clean and carry no loss.
        simulated: Whether the clips are not data, noised, but states of the student's own rollouts at these levels
            (after the backward simulation of DMD2, arXiv 2405.14867, section 4.5). Of data, a chunk that is made of
            pure noise cannot fit those that follow it nearly clean, is compared as if it could, and loses its variety;
            in a rollout they follow what this noise becomes. And the student learns to mend its own mistakes.
    """

    given: int = 0
    simulated: bool = False

    def __post_init__(self) -> None:
        check_range("forcing.given", self.given, least=0)

    @property
    def needs_clips(self) -> bool:
        """Data are what is noised, or given."""
        return not self.simulated or self.given > 0

    def generate(self, student: Any, batch: Batch, axes: Axes, key: jax.Array, key_b: jax.Array) -> Generated:
        """Denoises each clip of the batch in one pass; arguments as `SelfForcing.generate`."""
        layout, solver = axes.layout(axes.sampler.frames), axes.sampler.solver
        index = self._rows(key_b, layout, solver.steps)
        given = layout.chunks.index(self.given)
        level = jnp.asarray(level_table(solver))[index].at[:, :given].set(0.0)
        clips, latents = self._clips(student, batch, axes, targets.fold_each(key_b, 1), index, level)
        noisy = Frames(latents, level, layout)
        output = student(self._streams(noisy, clips, axes), batch.conditions, visibility=axes.visibility)
        clean = flow.to_x0(student.config.prediction, output.predictions[-1], noisy.latents, noisy.level)
        video = jnp.concatenate([noisy.latents[:, :given], clean[:, given:]], axis=1)
        return Generated(video, batch.conditions, {}, given)

    def _rows(self, key_b: jax.Array, layout: Layout, steps: int) -> jax.Array:
        """Draws the row of the solver's table to which each frame is noised, int32 `[b, f]`; `steps` is clean."""
        return solver_indices(key_b, layout, steps + 1)

    def _clips(
        self, student: Any, batch: Batch, axes: Axes, key_b: jax.Array, index: jax.Array, level: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Clips, and the same noised: each frame at its row `index` of the solver's table, which is `level`."""
        if not self.simulated:
            noise = targets.clip_noise(key_b, batch.latents.shape[1:])
            return batch.latents, flow.interpolate(batch.latents, noise, level)
        sampler, frozen = axes.sampler, jax.lax.stop_gradient(student)
        given = batch.latents[:, : axes.layout(sampler.frames).chunks.index(self.given)] if self.given else None
        conditions = sampler.encode(frozen, batch.conditions)
        states = chunk_by_chunk(sampler, tuple(range(sampler.solver.steps + 1)), frozen, key_b, conditions, given)
        return states[:, -1], states[jnp.arange(index.shape[0])[:, None], index, jnp.arange(index.shape[1])]

    def _streams(self, noisy: Frames, clips: jax.Array, axes: Axes) -> tuple[Frames, ...]:
        """What the network is shown; the noisy clip is last."""
        return (noisy,)


@dataclass(frozen=True)
class DiffusionForcing(_Parallel):
    """The past is as noisy as it comes, in one chunk-causal pass (CausVid, arXiv 2412.07772)."""

    kind: ClassVar[str] = "diffusion"


@dataclass(frozen=True)
class TeacherForcing(_Parallel):
    """The past is clean, in one pass over clean ‖ noised clips (the TF + DMD baseline of Self Forcing)."""

    kind: ClassVar[str] = "teacher"

    def _rows(self, key_b: jax.Array, layout: Layout, steps: int) -> jax.Array:
        """One row for a whole simulated clip: what pure noise becomes at once is not what the next chunks follow."""
        if not self.simulated:
            return super()._rows(key_b, layout, steps)
        row = jax.vmap(lambda key: jax.random.randint(key, (1,), 0, steps))(key_b)
        return jnp.broadcast_to(row, (row.shape[0], len(layout.chunks)))

    def _streams(self, noisy: Frames, clips: jax.Array, axes: Axes) -> tuple[Frames, ...]:
        layout = axes.layout(clips.shape[1], CLEAN)
        return Frames(clips, jnp.zeros_like(noisy.level), layout), noisy


Forcing = SelfForcing | DiffusionForcing | TeacherForcing


def solver_indices(key_b: jax.Array, layout: Layout, count: int) -> jax.Array:
    """Draws one of `count` indices for each chunk of each clip, spread over its frames: int32 `[b, f]`."""
    chunks = layout.chunks[-1] + 1
    drawn = jax.vmap(lambda key: jax.random.randint(key, (chunks,), 0, count))(key_b)
    return drawn[:, jnp.asarray(layout.chunks, jnp.int32)]
