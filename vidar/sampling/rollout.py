"""The rollout: generating chunk after chunk through the context cache, by ticks.

One `tick` serves self-forcing training (with `exit_row`), offline sampling and live streaming. A sampler is a static,
hashable description; everything that changes is in `State`. This room must not know objectives, drivers or servers.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidar.attention.cache import ContextCache, ContextConfig, Geometry, init_cache, write
from vidar.attention.visibility import Layout, Visibility, chunk_layout
from vidar.diffusion import flow
from vidar.diffusion.plan import Commit, RowGroup, TickProgram, tick_program
from vidar.errors import ConfigError
from vidar.models.frames import Conditions, Frames, repeat_rows
from vidar.sampling.guidance import UNGUIDED, Guidance, combine, fold
from vidar.sampling.noise import Purpose, frame_noise
from vidar.sampling.solvers import Euler, Solver, level_table

_NO_LIMIT = 2**30


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "latents", "actions", "next_frame", "origin", "limit", "key", "active"],
    meta_fields=[],
)
@dataclass(frozen=True)
class State:
    """Everything that a rollout carries from tick to tick.

    Attributes:
        cache: Context cache over all branches; None where the plan keeps no context (lag 0).
        latents: Chunks in flight between ticks, oldest first, `[b, f, h, w, c]` (f may be 0).
        actions: Actions of the frames in flight, or None.
        next_frame: Absolute frame at which the next chunk starts, `[b]`, or a scalar for rows in step.
        origin: First generated frame; frames before it were given.
        limit: Frame at which generation ends; later chunks never exist.
        key: Session keys `[b]`.
        active: Sessions that run, bool `[b]`, or None when all do.
    """

    cache: ContextCache | None
    latents: jax.Array
    actions: jax.Array | None
    next_frame: jax.Array
    origin: jax.Array
    limit: jax.Array
    key: jax.Array
    active: jax.Array | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["latents", "frame", "valid"], meta_fields=[])
@dataclass(frozen=True)
class Chunk:
    """What a tick emits.

    Attributes:
        latents: Finished frames `[b, f, h, w, c]`.
        frame: Absolute index of the first of them, `[b]`.
        valid: Whether the row emitted anything, bool `[b]`.
    """

    latents: jax.Array
    frame: jax.Array
    valid: jax.Array


@dataclass(frozen=True)
class Sampler:
    """How a network is sampled; hashable, so that it can be a static argument.

    Attributes:
        visibility: Who sees whom, in flight and in the cache.
        latent: Shape of one frame's latents, `(h, w, c)`.
        tokens: Tokens of a frame.
        frames: Frames of a clip: capacity of an *append* context, and the whole tick when lag is 0.
        chunk: Frames a chunk.
        solver: Solver and its levels.
        lag: Solver steps between the starts of two chunks; None for one chunk after the other.
        commit: How finished chunks enter the cache.
        context: Window, sink and positions.
        guidance: Branches.
        first: Whether the first frame is a chunk of its own.
        cache_dtype: Type of cached keys and values.
    """

    visibility: Visibility
    latent: tuple[int, int, int]
    tokens: int
    frames: int
    chunk: int = 1
    solver: Solver = field(default_factory=Euler)
    lag: int | None = None
    commit: Commit = Commit("extra_pass")
    context: ContextConfig = ContextConfig()
    guidance: Guidance = UNGUIDED
    first: bool = False
    cache_dtype: str = "bfloat16"

    @property
    def program(self) -> TickProgram:
        """Row kinds between two emitted chunks."""
        lag = self.solver.steps if self.lag is None else self.lag
        chunks = chunk_layout(self.frames, self.chunk, independent_first_frame=self.first).chunks[-1] + 1
        return tick_program(self.solver.steps, lag, self.commit if lag else None, chunks)

    @property
    def carried(self) -> int:
        """Frames in flight between ticks."""
        program = self.program
        if not program.lag:
            return 0
        return self.chunk * (program.width - 1 + (self.commit.kind == "fused"))

    @property
    def geometry(self) -> Geometry:
        """Shape of the context cache."""
        capacity = self.context.capacity(self.frames, self.chunk)
        relative = self.context.positions == "relative"
        return Geometry(capacity, self.tokens, self.chunk, self.context.sink, self.first, relative)

    def init(
        self, model: Any, key_b: jax.Array, *, actions: Any = None, in_step: bool = False, limit: int = _NO_LIMIT
    ) -> State:
        """An empty state.

        Args:
            model: The network (its config gives layers and heads).
            key_b: Session keys `[b]`.
            actions: Any actions array of the network's kind, whose trailing shape and type the state takes over.
            in_step: Whether all rows always stand at the same frame (training rollouts).
            limit: Frame at which generation ends.

        Returns:
            The state before the first tick.
        """
        rows = key_b.shape[0]
        shape = () if in_step else (rows,)
        cache = None
        if self.program.lag:
            config = model.config
            cache = init_cache(
                self.geometry,
                layers=config.layers,
                rows=rows * len(self.guidance),
                heads=config.heads,
                head_dim=config.head_dim,
                dtype=jnp.dtype(self.cache_dtype),
                in_step=in_step,
            )
        carried = None
        if actions is not None:
            carried = jnp.zeros((rows, self.carried, *actions.shape[2:]), actions.dtype)
        return State(
            cache=cache,
            latents=jnp.zeros((rows, self.carried, *self.latent), jnp.float32),
            actions=carried,
            next_frame=jnp.zeros(shape, jnp.int32),
            origin=jnp.zeros(shape, jnp.int32),
            limit=jnp.full(shape, limit, jnp.int32),
            key=key_b,
        )

    def encode(self, model: Any, conditions: Conditions) -> Conditions:
        """Projects text once per prompt, for all branches; other conditions pass through."""
        if conditions.text is None:
            return conditions
        folded = fold(replace(conditions, actions=None, label=None), self.guidance)
        return replace(conditions, text=model.encode_conditioning(folded.text, folded.text_kept), text_kept=None)

    # --------------------------------------------------------------------------------------------------------- tick

    def tick(
        self, model: Any, state: State, conditions: Conditions, *, exit_row: jax.Array | None = None
    ) -> tuple[State, Chunk]:
        """The work between two emitted chunks.

        Args:
            model: The network.
            state: State of all sessions; donate it.
            conditions: Actions of the frames of the new chunk (all frames when lag is 0), label, and text, projected
                by `encode`.
            exit_row: Self-forcing form: solver steps before this row run without gradient, this row's clean prediction
                is what the tick emits and commits, and it alone is differentiated. Needs one chunk in flight.

        Returns:
            State and the emitted chunk.
        """
        program = self.program
        flight = _Flight.enter(self, program, state, conditions)
        if exit_row is not None:
            flight = flight.run_to_exit(model, exit_row)
        else:
            for group in program.groups:
                if group.kind != "commit":
                    flight = flight.run(model, group)
        if program.lag and self.commit.kind == "extra_pass":
            flight = flight.commit_first(model)
        return flight.leave()

    def prefill(self, model: Any, state: State, latents_bfhwc: jax.Array, conditions: Conditions) -> State:
        """Commits given frames (a first image, a video to continue), chunk by chunk, before the first tick.

        Args:
            model: The network.
            state: A fresh state.
            latents_bfhwc: Clean latents of the given frames, whole chunks.
            conditions: Conditions with the actions of these frames; text projected by `encode`.

        Returns:
            The state from which generation goes on.

        Raises:
            ConfigError: The frames are not whole chunks, or the plan has no context.
        """
        frames = latents_bfhwc.shape[1]
        head = 1 if self.first else 0
        if not self.program.lag:
            raise ConfigError("given frames need a context cache: use a plan with lag > 0")
        if (frames - head) % self.chunk or frames < head:
            raise ConfigError(
                f"{frames} given frames are not whole chunks of {self.chunk}"
                f"{' after a first frame of its own' if head else ''}; "
                "give whole chunks, or set independent_first_frame for a single first image"
            )
        clean = replace(self, commit=replace(self.commit, kind="extra_pass"))

        def commit(state: State, chunk: int, latents: jax.Array, conditions: Conditions) -> State:
            sampler = replace(clean, chunk=chunk)
            flight = _Flight(sampler, state, latents, conditions, state.next_frame, chunk_layout(chunk, chunk))
            cache = flight.commit_first(model).state.cache
            return replace(state, cache=cache, next_frame=state.next_frame + chunk)

        if head:
            state = commit(state, 1, latents_bfhwc[:, :1], conditions.frames(0, 1))
        count = (frames - head) // self.chunk
        if count:
            parts = _chunked(latents_bfhwc[:, head:], count)
            actions = None if conditions.actions is None else _chunked(conditions.actions[:, head:frames], count)

            def body(state: State, part: Any) -> tuple[State, None]:
                return commit(state, self.chunk, part[0], replace(conditions, actions=part[1])), None

            state, _ = jax.lax.scan(body, state, (parts, actions))
        return replace(state, origin=state.next_frame)

    def rollout(
        self, model: Any, state: State, conditions: Conditions, chunks: int, *, exit_row: jax.Array | None = None
    ) -> tuple[State, jax.Array]:
        """Generates `chunks` chunks by scanning ticks.

        Args:
            model: The network.
            state: Fresh or prefilled state.
            conditions: Conditions of the generated frames; text projected by `encode`.
            chunks: Chunks to generate.
            exit_row: See `tick`; shared by all chunks.

        Returns:
            State and latents `[b, chunks · chunk, h, w, c]`.
        """
        program = self.program
        if not program.lag:
            state, chunk = self.tick(model, state, conditions)
            return state, chunk.latents
        ticks = chunks + program.delay
        actions = conditions.actions
        if actions is not None:
            last = jnp.repeat(actions[:, -1:], program.delay * self.chunk, axis=1)
            actions = _chunked(jnp.concatenate([actions, last], axis=1), ticks)

        def body(state: State, actions: Any) -> tuple[State, jax.Array]:
            state, chunk = self.tick(model, state, replace(conditions, actions=actions), exit_row=exit_row)
            return state, chunk.latents

        state, latents = jax.lax.scan(body, state, actions, length=ticks)
        latents = jnp.moveaxis(latents[program.delay :], 0, 1)
        return state, latents.reshape(latents.shape[0], chunks * self.chunk, *self.latent)

    def generate(
        self, model: Any, key_b: jax.Array, conditions: Conditions, frames: int, given: jax.Array | None = None
    ) -> jax.Array:
        """Generates a clip: from noise, from a first image, or as the continuation of given frames.

        Args:
            model: The network.
            key_b: Session keys `[b]`.
            conditions: Conditions of all `frames` frames, given ones included.
            frames: Frames of the clip, given ones included.
            given: Clean latents of the first frames, or None.

        Returns:
            Latents `[b, frames, h, w, c]`; the first ones are the given ones.
        """
        conditions = self.encode(model, conditions)
        state = self.init(model, key_b, actions=conditions.actions, limit=frames)
        start, parts = 0, []
        if given is not None:
            start = given.shape[1]
            state = self.prefill(model, state, given, conditions.frames(0, start))
            parts.append(given)
        elif self.first and self.program.lag:
            alone = replace(self, chunk=1, lag=None, commit=replace(self.commit, kind="extra_pass"))
            opening = replace(state, latents=state.latents[:, :0], actions=_none_or(state.actions, slice(0, 0)))
            opening, first = alone.tick(model, opening, conditions.frames(0, 1))
            state = replace(opening, latents=state.latents, actions=state.actions, origin=opening.next_frame)
            start, parts = 1, [first.latents]
        chunks, rest = divmod(frames - start, self.chunk)
        if rest:
            raise ConfigError(f"{frames - start} frames to generate are not whole chunks of {self.chunk}")
        _, latents = self.rollout(model, state, conditions.frames(start, frames), chunks)
        return jnp.concatenate([*parts, latents], axis=1)


@dataclass(frozen=True)
class _Flight:
    """The chunks of one tick, between entering and leaving it."""

    sampler: Sampler
    state: State
    latents: jax.Array
    conditions: Conditions
    start: jax.Array
    layout: Layout
    exists: jax.Array | None = None

    @classmethod
    def enter(cls, sampler: Sampler, program: TickProgram, state: State, conditions: Conditions) -> "_Flight":
        """Brings the new chunk's noise in behind the chunks in flight."""
        new = sampler.frames if not program.lag else sampler.chunk
        frames = sampler.carried + new
        rows = state.key.shape[0]
        new_frames = jnp.broadcast_to(jnp.reshape(state.next_frame, (-1, 1)), (rows, 1)) + _range(new)[None]
        noise = frame_noise(
            state.key, Purpose.INITIAL, new_frames, jnp.zeros((new,), jnp.int32), sampler.latent
        )
        latents = jnp.concatenate([state.latents, noise], axis=1)
        if conditions.actions is not None and state.actions is not None:
            actions = jnp.concatenate([state.actions, conditions.actions], axis=1)
            conditions = replace(conditions, actions=actions)
        start = state.next_frame - sampler.carried
        layout = chunk_layout(frames, sampler.chunk, independent_first_frame=sampler.first and not program.lag)
        exists = None
        if sampler.carried:
            frame = jnp.reshape(start, (-1, 1)) + _range(frames)[None]
            exists = (frame >= jnp.reshape(state.origin, (-1, 1))) & (frame < jnp.reshape(state.limit, (-1, 1)))
        return cls(sampler, state, latents, conditions, start, layout, exists)

    # ---------------------------------------------------------------------------------------------------------- rows

    def run(self, model: Any, group: RowGroup) -> "_Flight":
        """Runs the rows of a denoising or fused group; a group of several rows is scanned."""
        before = np.asarray(group.before, np.int32)
        after = np.asarray(group.after, np.int32)
        skip = self.sampler.carried // self.sampler.chunk + self._new_chunks - before.shape[1]

        def row(latents: jax.Array, progress: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Any]:
            part = self._slots(latents, skip)
            output, stepped = part._row(model, *progress, fused=group.kind == "fused")
            latents = jnp.concatenate([latents[:, : skip * self.sampler.chunk], stepped], axis=1)
            return latents, (output.keys, output.values) if group.write else None

        if len(before) == 1:
            latents, written = row(self.latents, (jnp.asarray(before[0]), jnp.asarray(after[0])))
        else:
            latents, written = jax.lax.scan(row, self.latents, (jnp.asarray(before), jnp.asarray(after)))
        flight = replace(self, latents=latents)
        if not group.write:
            return flight
        keys, values = written
        first = slice(0, self.sampler.chunk * self.sampler.tokens)
        return flight._write(keys[:, :, first], values[:, :, first])

    @property
    def _new_chunks(self) -> int:
        return self.sampler.program.emits if not self.sampler.program.lag else 1

    def _slots(self, latents: jax.Array, skip: int) -> "_Flight":
        """The flight without its first `skip` chunks (the committed chunk of a fused plan's later rows)."""
        frames = skip * self.sampler.chunk
        if not frames:
            return replace(self, latents=latents)
        actions = _none_or(self.conditions.actions, slice(frames, None))
        return replace(
            self,
            latents=latents[:, frames:],
            conditions=replace(self.conditions, actions=actions),
            start=self.start + frames,
            layout=chunk_layout(self.layout.frames - frames, self.sampler.chunk),
            exists=_none_or(self.exists, slice(frames, None)) if self.sampler.program.width > 1 else None,
        )

    def _row(
        self, model: Any, before_u: jax.Array, after_u: jax.Array, *, fused: bool = False
    ) -> tuple[Any, jax.Array]:
        """One forward and one solver step of every chunk whose progress advances."""
        sampler = self.sampler
        table = jnp.asarray(level_table(sampler.solver))
        chunk_of = np.asarray(self.layout.chunks)
        before, after = before_u[chunk_of], after_u[chunk_of]
        level, next_level = table[before], table[after]
        moved = after > before
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
        rows = x.shape[0]
        levels = (jnp.broadcast_to(value[None], (rows, value.shape[0])) for value in (level, next_level))
        stepped = sampler.solver.step(model.config.prediction, prediction, self.latents, *levels, noise)
        return output, jnp.where(moved[None, :, None, None, None], stepped, self.latents)

    def _forward(
        self, model: Any, latents: jax.Array, level_f: jax.Array, time_f: jax.Array | None, drops: tuple[str, ...] = ()
    ) -> tuple[Any, jax.Array]:
        """One pass of all branches; returns the raw output and the guided prediction."""
        branches = self.sampler.guidance
        rows = latents.shape[0]
        conditions = self.conditions
        if drops:
            conditions = conditions.drop(drops, jnp.zeros((rows,), bool))

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

    def run_to_exit(self, model: Any, exit_row: jax.Array) -> "_Flight":
        """Self-forcing form of the denoising rows: the clean prediction at `exit_row`, the only differentiated pass."""
        if self.sampler.program.width != 1 or self.sampler.carried:
            raise ConfigError("exit_row needs one chunk in flight: lag = steps and a commit pass of its own")
        frozen = jax.lax.stop_gradient(model)
        constant = replace(self, state=jax.lax.stop_gradient(self.state))

        def step(row: jax.Array, latents: jax.Array) -> jax.Array:
            flight = replace(constant, latents=latents)
            return flight._row(frozen, row[None], row[None] + 1)[1]

        latents = jax.lax.fori_loop(0, exit_row, step, jax.lax.stop_gradient(self.latents))
        latents = jax.lax.stop_gradient(latents)
        level = jnp.broadcast_to(jnp.asarray(level_table(self.sampler.solver))[exit_row], (self.layout.frames,))

        @jax.checkpoint
        def predict(model: Any, latents: jax.Array) -> jax.Array:
            _, prediction = constant._forward(model, latents, level, None)
            rows = jnp.broadcast_to(level[None], (latents.shape[0], level.shape[0]))
            return flow.to_x0(model.config.prediction, prediction, latents, rows)

        return replace(self, latents=predict(model, latents))

    def commit_first(self, model: Any) -> "_Flight":
        """Writes the finished oldest chunk to the cache, by a pass at the commit's level; never differentiated."""
        frames = self.sampler.chunk
        commit = self.sampler.commit
        part = replace(
            self,
            state=jax.lax.stop_gradient(self.state),
            latents=jax.lax.stop_gradient(self.latents[:, :frames]),
            conditions=self.conditions.frames(0, frames),
            layout=chunk_layout(frames, frames),
            exists=None,
        )
        level = jnp.full((frames,), commit.level, jnp.float32)
        time = None if commit.time is None else jnp.full((frames,), commit.time, jnp.float32)
        latents = part._noised(jnp.ones((frames,), bool)) if commit.noise else part.latents
        output, _ = part._forward(jax.lax.stop_gradient(model), latents, level, time, commit.drops)
        return self._write(output.keys, output.values)

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

    def _write(self, keys: jax.Array, values: jax.Array) -> "_Flight":
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
        emitted = self._slots(self.latents, 1) if fused else self
        first = jnp.broadcast_to(emitted.start, (rows,))
        valid = (first >= jnp.broadcast_to(state.origin, (rows,))) & (first < jnp.broadcast_to(state.limit, (rows,)))
        if state.active is not None:
            valid = valid & state.active
        chunk = Chunk(emitted.latents[:, :frames], first, valid)
        latents, actions = self.latents[:, frames:], _none_or(self.conditions.actions, slice(frames, None))
        if not sampler.carried:
            latents, actions = latents[:, :0], _none_or(actions, slice(0, 0))
        if state.actions is None:
            actions = None
        next_frame = state.next_frame + new
        if state.active is not None:
            keep = state.active
            latents = jnp.where(keep[:, None, None, None, None], latents, state.latents)
            if actions is not None and state.actions is not None:
                shape = (-1,) + (1,) * (actions.ndim - 1)
                actions = jnp.where(keep.reshape(shape), actions, state.actions)
            next_frame = jnp.where(keep, next_frame, state.next_frame)
        return replace(state, latents=latents, actions=actions, next_frame=next_frame), chunk


def _chunked(x: jax.Array, count: int) -> jax.Array:
    """`[b, count · n, ...]` → `[count, b, n, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


def _commit_time(commit: Commit) -> float:
    return 1000.0 * commit.level if commit.time is None else commit.time


def _none_or(x: jax.Array | None, part: slice) -> jax.Array | None:
    return None if x is None else x[:, part]


def _range(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)
