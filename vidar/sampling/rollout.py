"""The rollout: generating chunk after chunk through the context cache, by ticks.

One `tick` serves self-forcing training (with `exit_row`), offline sampling and live streaming. A sampler is a static,
hashable description; everything that changes is in `State`. This room must not know objectives, drivers or servers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from vidar.attention.cache import ContextConfig, Geometry, init_cache
from vidar.attention.visibility import Visibility, chunk_layout
from vidar.diffusion.plan import Commit, RowGroup, TickProgram, tick_program
from vidar.errors import ConfigError, check_range
from vidar.models.frames import Conditions
from vidar.sampling.flight import KEPT, OFFLOADED, Chunk, Flight, Gradient, Source, State, cut
from vidar.sampling.guidance import UNGUIDED, Guidance, fold
from vidar.sampling.solvers import Euler, Solver

_NO_LIMIT = 2**30
ADVANCE = "advance"
"""Scope of the loop over chunks whose number is known only when it runs."""
_OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[KEPT],
    names_which_can_be_offloaded=[OFFLOADED],
    offload_src="device",
    offload_dst="pinned_host",
)


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
    commit: Commit = field(default_factory=lambda: Commit("extra_pass"))
    context: ContextConfig = field(default_factory=ContextConfig)
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
            history=self.no_history(rows, self.carried),
            actions=carried,
            next_frame=jnp.zeros(shape, jnp.int32),
            origin=jnp.zeros(shape, jnp.int32),
            limit=jnp.full(shape, limit, jnp.int32),
            key=key_b,
        )

    def no_history(self, rows: int, frames: int) -> jax.Array:
        """What the solver remembers of frames that have taken no step, `[b, f, k, h, w, c]`."""
        return jnp.zeros((rows, frames, self.solver.remembered, *self.latent), jnp.float32)

    def encode(self, model: Any, conditions: Conditions) -> Conditions:
        """Projects text and image once per prompt, for all branches; other conditions pass through."""
        if conditions.text is None:
            return conditions
        folded = fold(replace(conditions, actions=None, label=None, latents=None), self.guidance)
        text = model.encode_conditioning(folded.text, folded.text_kept, folded.image, folded.negative)
        return replace(conditions, text=text, text_kept=None, image=None, negative=None)

    # --------------------------------------------------------------------------------------------------------- tick

    def tick(
        self,
        model: Any,
        state: State,
        conditions: Conditions,
        *,
        exit_row: jax.Array | None = None,
        gradient: Gradient = Gradient(),
        source: Source | None = None,
    ) -> tuple[State, Chunk]:
        """The work between two emitted chunks.

        Args:
            model: The network.
            state: State of all sessions; donate it.
            conditions: Actions of the frames of the new chunk (all frames when lag is 0), label, and text, projected
                by `encode`.
            exit_row: Self-forcing form: this solver step's clean prediction is what the tick emits and commits, and
                what is differentiated. Needs one chunk in flight.
            gradient: What else is differentiated in that form.
            source: Frames that the new chunk starts from in place of noise.

        Returns:
            State and the emitted chunk.
        """
        program = self.program
        flight, exit_written = Flight.enter(self, state, conditions, source), None
        if exit_row is not None:
            flight, exit_written = flight.run_to_exit(model, exit_row, gradient)
        else:
            for group in _later(program.groups, source.skip if source else 0):
                if group.kind != "commit":
                    flight = flight.run(model, group)
        if program.lag and self.commit.kind == "extra_pass":
            flight = flight.commit_first(model, exit_written)
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
        # Given frames are data: they need no noise against the network's own errors. A time tag stays.
        level = 0.0 if self.commit.noise else self.commit.level
        clean = replace(self, commit=replace(self.commit, kind="extra_pass", level=level, noise=False))

        def commit(state: State, chunk: int, latents: jax.Array, conditions: Conditions) -> State:
            sampler = replace(clean, chunk=chunk)
            history = self.no_history(latents.shape[0], chunk)
            flight = Flight(sampler, state, latents, history, conditions, state.next_frame, chunk_layout(chunk, chunk))
            cache = flight.commit_first(model).state.cache
            step = chunk if state.active is None else chunk * state.active.astype(jnp.int32)
            return replace(state, cache=cache, next_frame=state.next_frame + step)

        if head:
            state = commit(state, 1, latents_bfhwc[:, :1], conditions.frames(0, 1))
        count = (frames - head) // self.chunk
        if count:
            parts = _chunked(latents_bfhwc[:, head:], count)
            actions = None if conditions.actions is None else _chunked(conditions.actions[:, head:frames], count)

            def body(state: State, part: Any) -> tuple[State, None]:
                return commit(state, self.chunk, part[0], replace(conditions, actions=part[1])), None

            state, _ = jax.lax.scan(body, state, (parts, actions))
        origin = state.next_frame
        if state.active is not None:
            origin = jnp.where(state.active, origin, state.origin)
        return replace(state, origin=origin)

    def rollout(
        self,
        model: Any,
        state: State,
        conditions: Conditions,
        chunks: int,
        *,
        exit_rows: jax.Array | None = None,
        gradient: Gradient = Gradient(),
        source: Source | None = None,
    ) -> tuple[State, jax.Array]:
        """Generates `chunks` chunks by scanning ticks.

        Args:
            model: The network.
            state: Fresh or prefilled state.
            conditions: Conditions of the generated frames; text projected by `encode`.
            chunks: Chunks to generate.
            exit_rows: See `tick`; one for each chunk, int32 `[chunks]`.
            gradient: See `tick`.
            source: See `tick`; all generated frames.

        Returns:
            State and latents `[b, chunks · chunk, h, w, c]`.
        """
        program = self.program
        if not program.lag:
            state, chunk = self.tick(model, state, conditions, source=source)
            return state, chunk.latents
        ticks = chunks + program.delay
        actions = conditions.actions
        if actions is not None:
            last = jnp.repeat(actions[:, -1:], program.delay * self.chunk, axis=1)
            actions = _chunked(jnp.concatenate([actions, last], axis=1), ticks)

        chunks_of = None
        if source is not None:
            source.check(self)
            chunks_of = _chunked(source.latents, ticks)

        def body(state: State, part: tuple[Any, Any, Any]) -> tuple[State, jax.Array]:
            actions, exit_row, latents = part
            now = None if source is None else replace(source, latents=latents)
            choices = {"exit_row": exit_row, "gradient": gradient, "source": now}
            state, chunk = self.tick(model, state, replace(conditions, actions=actions), **choices)
            return state, chunk.latents

        if gradient.offload:
            body = jax.checkpoint(body, policy=_OFFLOAD)
        state, latents = jax.lax.scan(body, state, (actions, exit_rows, chunks_of), length=ticks)
        latents = jnp.moveaxis(latents[program.delay :], 0, 1)
        return state, latents.reshape(latents.shape[0], chunks * self.chunk, *self.latent)

    def advance(
        self, model: Any, state: State, conditions: Conditions, chunks: jax.Array, latents: jax.Array
    ) -> tuple[State, jax.Array]:
        """Generates a number of chunks that is known only when it runs; not differentiable.

        Args:
            model: The network.
            state: Fresh or prefilled state of a plan with one chunk in flight.
            conditions: Conditions of more frames than are generated; text projected by `encode`.
            chunks: How many, int32 scalar.
            latents: The frames before them, `[b, f, h, w, c]`.

        Returns:
            State, and the last f frames of `latents` with what was generated.
        """

        def body(index: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, latents = carry
            state, chunk = self.tick(model, state, conditions.frames_at(index * self.chunk, self.chunk))
            return state, jnp.concatenate([latents, chunk.latents], axis=1)[:, self.chunk :]

        with jax.named_scope(ADVANCE):
            return jax.lax.fori_loop(0, chunks, body, (state, latents))

    def generate(
        self,
        model: Any,
        key_b: jax.Array,
        conditions: Conditions,
        frames: int,
        given: jax.Array | None = None,
        source: Source | None = None,
    ) -> jax.Array:
        """Generates a clip: from noise, from a first image, as the continuation of given frames, or from a video.

        Args:
            model: The network.
            key_b: Session keys `[b]`.
            conditions: Conditions of all `frames` frames, given ones included.
            frames: Frames of the clip, given ones included.
            given: Clean latents of the first frames, or None.
            source: A video of all `frames` frames to start from in place of noise, or None; not with given frames.

        Returns:
            Latents `[b, frames, h, w, c]`; the first ones are the given ones.

        Raises:
            ConfigError: The frames are not whole chunks, are all given, or do not fit the plan or an *append* context.
        """
        self._check_clip(frames, 0 if given is None else given.shape[1])
        if source is not None and (given is not None or source.latents.shape[1] != frames):
            raise ConfigError(f"a source video has all {frames} frames of the clip, and none are given beside it")
        conditions = self.encode(model, conditions)
        state = self.init(model, key_b, actions=conditions.actions, limit=frames)
        start, parts = 0, []
        if given is not None:
            start = given.shape[1]
            state = self.prefill(model, state, given, conditions.frames(0, start))
            parts.append(given)
        elif self.first and self.program.lag:
            alone = replace(self, chunk=1, lag=None, commit=replace(self.commit, kind="extra_pass"))
            empty = {name: cut(getattr(state, name), slice(0, 0)) for name in ("latents", "history", "actions")}
            opening = replace(state, **empty)
            begun = None if source is None else source.frames(0, 1)
            opening, first = alone.tick(model, opening, conditions.frames(0, 1), source=begun)
            carried = {name: getattr(state, name) for name in empty}
            state = replace(opening, **carried, origin=opening.next_frame)
            start, parts = 1, [first.latents]
        chunks, rest = divmod(frames - start, self.chunk)
        if rest and self.program.lag:
            raise ConfigError(f"{frames - start} frames to generate are not whole chunks of {self.chunk}")
        if self.program.lag and not chunks:
            return jnp.concatenate(parts, axis=1)
        rest_of = None if source is None else source.frames(start, frames)
        _, latents = self.rollout(model, state, conditions.frames(start, frames), chunks, source=rest_of)
        return jnp.concatenate([*parts, latents], axis=1)

    def _check_clip(self, frames: int, given: int) -> None:
        check_range("frames", frames, least=1)
        if frames <= given:
            raise ConfigError(f"frames={frames} with {given} given ones leave none to generate: ask for more frames")
        if not self.program.lag and frames != self.frames:
            raise ConfigError(f"a plan with lag=0 generates all {self.frames} frames of a clip at once, not {frames}")
        if self.context.window is None and frames > self.frames:
            raise ConfigError(
                f"a context without a window holds clips of {self.frames} frames, not {frames}: set context.window"
            )


def _later(groups: Sequence[RowGroup], skip: int) -> Iterator[RowGroup]:
    """The rows of a tick without its first `skip` ones."""
    for group in groups:
        rows = len(group.before)
        if rows > skip:
            yield replace(group, before=group.before[skip:], after=group.after[skip:])
        skip = max(0, skip - rows)


def _chunked(x: jax.Array, count: int) -> jax.Array:
    """`[b, count · n, ...]` → `[count, b, n, ...]`."""
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)
