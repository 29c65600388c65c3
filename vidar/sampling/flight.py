"""The chunks in flight during one tick: entering with fresh noise, rows of a plan, commit, leaving.

A flight exists within a tick only; between ticks there is `State`. This room must not know objectives or drivers.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vidar.attention.cache import ConditionCache, write
from vidar.attention.visibility import Layout, chunk_layout
from vidar.diffusion import flow
from vidar.diffusion.plan import Commit, RowGroup
from vidar.errors import ConfigError, check_range
from vidar.models.frames import Conditions, Frames, repeat_rows
from vidar.sampling.guidance import combine, fold
from vidar.sampling.noise import Purpose, frame_noise
from vidar.sampling.solvers import level_table

KEPT, OFFLOADED = "noisy", "context"
"""Names of what the backward pass of a rollout needs, for the policy that decides where it waits."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "latents", "history", "actions", "next_frame", "origin", "limit", "key", "active"],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """Everything that a rollout carries from tick to tick.

    Attributes:
        cache: Context cache over all branches; None where the plan keeps no context (lag 0).
        latents: Chunks in flight between ticks, oldest first, `[b, f, h, w, c]` (f may be 0).
        history: What the solver remembers of them, `[b, f, k, h, w, c]` (k may be 0).
        actions: Actions of the frames in flight, or None.
        next_frame: Absolute frame at which the next chunk starts, `[b]`, or a scalar for rows in step.
        origin: First generated frame; frames before it were given.
        limit: Frame at which generation ends; later chunks never exist.
        key: Session keys `[b]`.
        active: Sessions that run, bool `[b]`, or None when all do.
    """

    cache: Any
    latents: Any
    history: Any
    actions: Any
    next_frame: Any
    origin: Any
    limit: Any
    key: Any
    active: Any = None


@dataclass(frozen=True)
class Gradient:
    """What of a training rollout is differentiated.

    Attributes:
        passes: The last solver passes of a chunk up to its exit, each kept for the gradient; 1 is the exit alone.
        through_cache: Whether a chunk's gradient also reaches the exits of the chunks before it: forward, the context
            is the clean pass's; backward, it counts as the keys and values of the exit (what the reference code of
            Self Forcing does, against its paper).
        offload: Whether the contexts that the backward pass needs wait in the host's memory.
    """

    passes: int = 1
    through_cache: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        check_range("gradient.passes", self.passes, least=1)


@partial(jax.tree_util.register_dataclass, data_fields=["latents", "frame", "valid"], meta_fields=[])
@dataclass(frozen=True)
class Chunk:
    """What a tick emits.

    Attributes:
        latents: Finished frames `[b, f, h, w, c]`.
        frame: Absolute index of the first of them, `[b]`.
        valid: Whether the row emitted anything, bool `[b]`.
    """

    latents: Any
    frame: Any
    valid: Any


@partial(jax.tree_util.register_dataclass, data_fields=["latents"], meta_fields=["skip"])
@dataclass(frozen=True)
class Source:
    """A video that generation starts from in place of noise: noised part of the way, and finished from there (SDEdit).

    Attributes:
        latents: Its frames, `[b, f, h, w, c]`.
        skip: Solver steps that are left out: the frames enter at the level that these would have reached.
    """

    latents: Any
    skip: int

    def frames(self, start: int, stop: int) -> "Source":
        """Frames `start:stop`."""
        return replace(self, latents=self.latents[:, start:stop])

    def check(self, sampler: Any) -> None:
        """Raises ConfigError where a plan or solver cannot begin in the middle."""
        program, solver = sampler.program, sampler.solver
        if (program.width > 1 and program.lag) or (sampler.commit.kind == "fused" and program.lag):
            raise ConfigError("a source video enters chunk by chunk: use plan.lag=None and a commit that is not fused")
        if solver.remembered:
            raise ConfigError(
                f"solver {solver.kind!r} remembers its steps and cannot begin later: use euler or few_step"
            )
        if not 0 <= self.skip < solver.steps:
            raise ConfigError(f"{self.skip} of {solver.steps} solver steps are left out: leave at least one to take")


@dataclass(frozen=True)
class Flight:
    """The chunks of one tick, between entering and leaving it."""

    sampler: Any
    state: State
    latents: jax.Array
    history: jax.Array
    conditions: Conditions
    start: jax.Array
    layout: Layout
    exists: jax.Array | None = None

    @classmethod
    def enter(cls, sampler: Any, state: State, conditions: Conditions, source: "Source | None" = None) -> "Flight":
        """Brings the new chunk's noise in behind the chunks in flight, or a source's frames noised."""
        program = sampler.program
        if program.lag and conditions.latents is not None:
            raise ConfigError("further latents of each frame are given for whole clips: use a plan with lag=0")
        new = sampler.chunk if program.lag else sampler.frames
        frames = sampler.carried + new
        rows = state.key.shape[0]
        new_frames = jnp.broadcast_to(jnp.reshape(state.next_frame, (-1, 1)), (rows, 1)) + _range(new)[None]
        noise = frame_noise(state.key, Purpose.INITIAL, new_frames, jnp.zeros((new,), jnp.int32), sampler.latent)
        if source is not None:
            source.check(sampler)
            level = float(level_table(sampler.solver)[source.skip])
            noise = flow.interpolate(source.latents, noise, jnp.full((rows, new), level, jnp.float32))
        latents = jnp.concatenate([state.latents, noise], axis=1)
        history = jnp.concatenate([state.history, sampler.no_history(rows, new)], axis=1)
        if conditions.actions is not None and state.actions is not None:
            actions = jnp.concatenate([state.actions, conditions.actions], axis=1)
            conditions = replace(conditions, actions=actions)
        start = state.next_frame - sampler.carried
        layout = chunk_layout(frames, sampler.chunk, independent_first_frame=sampler.first and not program.lag)
        exists = None
        if sampler.carried:
            frame = jnp.reshape(start, (-1, 1)) + _range(frames)[None]
            exists = (frame >= jnp.reshape(state.origin, (-1, 1))) & (frame < jnp.reshape(state.limit, (-1, 1)))
        return cls(sampler, state, latents, history, conditions, start, layout, exists)

    # ---------------------------------------------------------------------------------------------------------- rows

    def run(self, model: Any, group: RowGroup) -> "Flight":
        """Runs the rows of a denoising or fused group; a group of several rows is scanned."""
        before = np.asarray(group.before, np.int32)
        after = np.asarray(group.after, np.int32)
        skip = self.sampler.carried // self.sampler.chunk + self._new_chunks - before.shape[1]

        def row(moving: tuple[jax.Array, jax.Array], progress: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            part = self._slots(*moving, skip)
            output, *stepped = part._row(model, *progress, fused=group.kind == "fused")
            held = skip * self.sampler.chunk
            whole = tuple(jnp.concatenate([x[:, :held], new], axis=1) for x, new in zip(moving, stepped, strict=True))
            return whole, (output.keys, output.values) if group.write else None

        moving = self.latents, self.history
        if len(before) == 1:
            moving, written = row(moving, (jnp.asarray(before[0]), jnp.asarray(after[0])))
        else:
            moving, written = jax.lax.scan(row, moving, (jnp.asarray(before), jnp.asarray(after)))
        flight = replace(self, latents=moving[0], history=moving[1])
        if not group.write:
            return flight
        keys, values = written
        first = slice(0, self.sampler.chunk * self.sampler.tokens)
        return flight._write(keys[:, :, first], values[:, :, first])

    @property
    def _new_chunks(self) -> int:
        return self.sampler.program.emits if not self.sampler.program.lag else 1

    def _slots(self, latents: jax.Array, history: jax.Array, skip: int) -> "Flight":
        """The flight without its first `skip` chunks (the committed chunk of a fused plan's later rows)."""
        frames = skip * self.sampler.chunk
        if not frames:
            return replace(self, latents=latents, history=history)
        actions = cut(self.conditions.actions, slice(frames, None))
        return replace(
            self,
            latents=latents[:, frames:],
            history=history[:, frames:],
            conditions=replace(self.conditions, actions=actions),
            start=self.start + frames,
            layout=chunk_layout(self.layout.frames - frames, self.sampler.chunk),
            exists=cut(self.exists, slice(frames, None)) if self.sampler.program.width > 1 else None,
        )

    def _row(
        self, model: Any, before_u: jax.Array, after_u: jax.Array, *, fused: bool = False
    ) -> tuple[Any, jax.Array, jax.Array]:
        """One forward and one solver step of every chunk whose progress advances; its output, latents and history."""
        sampler = self.sampler
        table = jnp.asarray(level_table(sampler.solver))
        chunk_of = np.asarray(self.layout.chunks)
        before, after = before_u[chunk_of], after_u[chunk_of]
        level = table[before]
        time = None
        if fused:
            pending = jnp.asarray(chunk_of == 0)
            level = jnp.where(pending, sampler.commit.level, level)
            time = jnp.where(pending, _commit_time(sampler.commit), 1000.0 * level)
        x = self._noised(pending) if fused and sampler.commit.noise else self.latents
        output, prediction = self._forward(model, x, level, time)
        noise = None
        if sampler.solver.stochastic:
            noise = frame_noise(self.state.key, Purpose.RENOISE, self._frames(), after, sampler.latent)
        kind = model.config.prediction
        latents, history = sampler.solver.step(kind, prediction, self.latents, before, noise, self.history)
        # Frames that do not move are finished: nobody asks for their history any more.
        moved = (after > before)[None, :, None, None, None]
        return output, jnp.where(moved, latents, self.latents), history

    def _forward(
        self, model: Any, latents: jax.Array, level_f: jax.Array, time_f: jax.Array | None, drops: tuple[str, ...] = ()
    ) -> tuple[Any, jax.Array]:
        """One pass of all branches; returns the raw output and the guided prediction."""
        branches = self.sampler.guidance
        rows = latents.shape[0]
        conditions = self.conditions
        if drops:
            conditions = conditions.drop(drops, jnp.zeros((rows,), bool))
        if "text" in drops and isinstance(conditions.text, ConditionCache):
            conditions = replace(conditions, text=_null_text(model, conditions.text))

        def spread(value: jax.Array) -> jax.Array:
            return jnp.broadcast_to(value[None], (rows * len(branches), value.shape[0]))

        start = jnp.broadcast_to(self.start, (rows,))
        frames = Frames(
            latents=repeat_rows(latents, len(branches)),
            level=spread(level_f),
            layout=self.layout,
            time=None if time_f is None else spread(time_f),
            start=repeat_rows(start, len(branches)),
            active=None if self.exists is None else repeat_rows(
                jnp.broadcast_to(self.exists, (rows, self.exists.shape[1])), len(branches)
            ),
        )  # fmt: skip
        output = model(
            (frames,), fold(conditions, branches), visibility=self.sampler.visibility, cache=self.state.cache
        )
        return output, combine(output.predictions[0], branches)

    # -------------------------------------------------------------------------------------------------- exit, commit

    def run_to_exit(self, model: Any, exit_row: jax.Array, gradient: Gradient) -> tuple["Flight", Any]:
        """Self-forcing form of the denoising rows: the clean prediction at `exit_row`.

        Args:
            model: The network.
            exit_row: Solver step whose clean prediction counts, int32 scalar.
            gradient: What is differentiated: the passes before those that it names run without.

        Returns:
            The flight with the prediction as its latents; and the keys and values of the exit's pass, where the
            gradient goes through the cache.
        """
        if self.sampler.program.width != 1 or self.sampler.carried:
            raise ConfigError("exit_row needs one chunk in flight: lag = steps and a commit pass of its own")
        state = self.state if gradient.through_cache else jax.lax.stop_gradient(self.state)
        constant = replace(self, state=state)
        # A loop of unknown length has no reverse mode: text, which is differentiable, is cut inside it, too.
        frozen, conditions = jax.lax.stop_gradient((model, self.conditions))
        past = replace(self, state=jax.lax.stop_gradient(self.state), conditions=conditions)

        def step(row: jax.Array, moving: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            flight = replace(past, latents=moving[0], history=moving[1])
            _, latents, history = flight._row(frozen, row[None], row[None] + 1)
            return latents, history

        first = jnp.maximum(exit_row - (gradient.passes - 1), 0)
        moving = jax.lax.stop_gradient((self.latents, self.history))
        moving = jax.lax.stop_gradient(jax.lax.fori_loop(0, first, step, moving))
        if gradient.offload:
            moving = checkpoint_name(moving, KEPT)
            cache = state.cache
            cache = replace(
                cache,
                keys=checkpoint_name(cache.keys, OFFLOADED),
                values=checkpoint_name(cache.values, OFFLOADED),
                # TPUs cannot stack single numbers in the host's memory, and they are not worth the way.
                count=checkpoint_name(cache.count, KEPT),
            )
            constant = replace(constant, state=replace(state, cache=cache))

        @jax.checkpoint
        def advance(model: Any, moving: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[jax.Array, jax.Array]:
            flight = replace(constant, latents=moving[0], history=moving[1])
            _, latents, history = flight._row(model, row[None], row[None] + 1)
            moves = row < exit_row
            return jnp.where(moves, latents, moving[0]), jnp.where(moves, history, moving[1])

        for offset in range(gradient.passes - 1):
            moving = advance(model, moving, jnp.minimum(first + offset, self.sampler.solver.steps - 1))
        level = jnp.broadcast_to(jnp.asarray(level_table(self.sampler.solver))[exit_row], (self.layout.frames,))

        @jax.checkpoint
        def predict(model: Any, latents: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
            output, prediction = constant._forward(model, latents, level, None)
            rows = jnp.broadcast_to(level[None], (latents.shape[0], level.shape[0]))
            clean = flow.to_x0(model.config.prediction, prediction, latents, rows)
            return clean, (output.keys, output.values) if gradient.through_cache else None

        clean, written = predict(model, moving[0])
        return replace(constant, latents=clean), written

    def commit_first(self, model: Any, instead: tuple[jax.Array, jax.Array] | None = None) -> "Flight":
        """Writes the finished oldest chunk to the cache, by a pass at the commit's level, which is not differentiated.

        Args:
            model: The network.
            instead: Keys and values whose gradient what is written takes over; None for none.

        Returns:
            The flight with its cache written.
        """
        frames = self.sampler.chunk
        commit = self.sampler.commit
        part = replace(
            self,
            state=jax.lax.stop_gradient(self.state),
            latents=jax.lax.stop_gradient(self.latents[:, :frames]),
            conditions=jax.lax.stop_gradient(self.conditions.frames(0, frames)),
            layout=chunk_layout(frames, frames),
            exists=None,
        )
        level = jnp.full((frames,), commit.level, jnp.float32)
        time = None if commit.time is None else jnp.full((frames,), commit.time, jnp.float32)
        latents = part._noised(jnp.ones((frames,), bool)) if commit.noise else part.latents
        output, _ = part._forward(jax.lax.stop_gradient(model), latents, level, time, commit.drops)
        keys, values = output.keys, output.values
        if instead is not None:
            fixed = jax.lax.stop_gradient(instead)
            keys, values = keys + (instead[0] - fixed[0]), values + (instead[1] - fixed[1])
        return self._write(keys, values)

    def _noised(self, pending_f: jax.Array) -> jax.Array:
        """Latents with real noise at the commit's level on the frames that are committed."""
        level = jnp.where(pending_f, self.sampler.commit.level, 0.0)
        noise = frame_noise(
            self.state.key, Purpose.CONTEXT, self._frames(), jnp.zeros(level.shape, jnp.int32), self.sampler.latent
        )
        rows = jnp.broadcast_to(level[None], (self.latents.shape[0], level.shape[0]))
        return flow.interpolate(self.latents, noise, rows)

    def _frames(self) -> jax.Array:
        rows = self.latents.shape[0]
        start = jnp.broadcast_to(jnp.reshape(self.start, (-1, 1)), (rows, 1))
        return start + _range(self.layout.frames)[None]

    def _write(self, keys: jax.Array, values: jax.Array) -> "Flight":
        cache = self.state.cache
        assert cache is not None
        branches = len(self.sampler.guidance)
        active = self._emitting()
        if active is not None:
            active = active[0] if cache.count.ndim == 0 else repeat_rows(active, branches)
        return replace(self, state=replace(self.state, cache=write(cache, keys, values, active)))

    def _emitting(self) -> jax.Array | None:
        """Rows whose oldest chunk exists and whose session runs; None for all."""
        rows = self.latents.shape[0]
        exists = None if self.exists is None else jnp.broadcast_to(self.exists[:, 0], (rows,))
        if self.state.active is None:
            return exists
        return self.state.active if exists is None else exists & self.state.active

    # --------------------------------------------------------------------------------------------------------- leave

    def leave(self) -> tuple[State, Chunk]:
        """Emits the oldest finished chunk and keeps the others in flight."""
        sampler, state = self.sampler, self.state
        rows = self.latents.shape[0]
        frames = sampler.chunk
        new = self.layout.frames - sampler.carried
        if not sampler.program.lag:
            everything = Chunk(self.latents, jnp.broadcast_to(state.next_frame, (rows,)), jnp.ones((rows,), bool))
            return replace(state, next_frame=state.next_frame + new), everything
        # A fused plan keeps the emitted chunk one more tick, until it is committed.
        fused = sampler.commit.kind == "fused"
        emitted = self._slots(self.latents, self.history, 1) if fused else self
        first = jnp.broadcast_to(emitted.start, (rows,))
        valid = (first >= jnp.broadcast_to(state.origin, (rows,))) & (first < jnp.broadcast_to(state.limit, (rows,)))
        if state.active is not None:
            valid = valid & state.active
        chunk = Chunk(emitted.latents[:, :frames], first, valid)
        kept = slice(frames, None) if sampler.carried else slice(0, 0)
        latents, history, actions = (cut(x, kept) for x in (self.latents, self.history, self.conditions.actions))
        if state.actions is None:
            actions = None
        next_frame = state.next_frame + new
        if state.active is not None:

            def running(new: jax.Array | None, old: Any) -> jax.Array | None:
                return None if new is None else jnp.where(state.active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            latents, history = running(latents, state.latents), running(history, state.history)
            actions, next_frame = running(actions, state.actions), running(next_frame, state.next_frame)
        return replace(state, latents=latents, history=history, actions=actions, next_frame=next_frame), chunk


def _null_text(model: Any, text: ConditionCache) -> ConditionCache:
    """Projected keys and values of dropped text, for as many rows as `text` has."""
    null = model.encode_conditioning(jnp.zeros((1, text.keys.shape[2], model.config.text.width), jnp.float32))
    keys, values = (jnp.broadcast_to(one, text.keys.shape) for one in (null.keys, null.values))
    return replace(text, keys=keys, values=values)


def _commit_time(commit: Commit) -> float:
    return 1000.0 * commit.level if commit.time is None else commit.time


def cut(x: jax.Array | None, part: slice) -> jax.Array | None:
    """Frames `part` of an array, or None of None."""
    return None if x is None else x[:, part]


def _range(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)
