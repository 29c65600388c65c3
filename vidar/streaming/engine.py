"""The streaming engine: two executables, a tick and a decode, each compiled once and dispatched asynchronously.

The host gives actions and takes uint8 frames; everything else stays on the device in donated state. This room must not
know training, command lines or how frames are shown.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vidar.errors import ConfigError
from vidar.models.frames import Conditions, row_labels
from vidar.models.layers import DiscreteActions, MultiBinaryActions
from vidar.sampling.flight import State
from vidar.sampling.noise import session_keys
from vidar.sampling.rollout import Sampler


@dataclass
class Timing:
    """Seconds spent before the first frame.

    Attributes:
        compile: Compiling (or reading from the persistent cache), by executable.
        warm_up: Running every executable once.
    """

    compile: dict[str, float] = field(default_factory=dict)
    warm_up: float = 0.0


class Engine:
    """Generates endless video for a fixed number of sessions in step with each other or not.

    Typical use: `engine = Engine(system.sampler, codec, model)`, `engine.open(seed=0, given=pixels)`, then
    `frames = engine.tick(actions)` for as long as one likes.
    """

    def __init__(
        self,
        sampler: Sampler,
        codec: Any,
        model: Any,
        *,
        rows: int = 1,
        text: Any = None,
        negative: Any = None,
        compile_now: bool = True,
    ):
        """Compiles all executables.

        Args:
            sampler: How the network is sampled; its plan must have lag > 0.
            codec: Latents to pixels; its weights, if any, become arguments of the executables.
            model: The network.
            rows: Sessions.
            text: Text states `[rows, s, c]` for networks with text, or None.
            negative: Those that stand for dropped text where it guides, `[rows, s, c]`; None for zeros.
            compile_now: Whether to compile and warm up here; else at the first use.

        Raises:
            ConfigError: The plan generates whole clips, or the network needs text.
        """
        if not isinstance(rows, int) or rows < 1:
            raise ConfigError(f"rows={rows!r} must be a number of sessions, at least 1")
        if not sampler.program.lag:
            raise ConfigError("a stream needs a plan with lag > 0; lag=0 generates whole clips")
        if (model.config.text is None) != (text is None) or (text is not None and len(text) != rows):
            raise ConfigError(f"give text states [{rows}, s, c] to stream exactly where model.text is set")
        if negative is not None and (text is None or np.shape(negative) != np.shape(text)):
            raise ConfigError(f"negative text states {list(np.shape(negative))} should be of the shape of the text's")
        if sampler.context.window is None:
            raise ConfigError("an endless stream needs a window: set context.window (append holds one clip only)")
        self.sampler = sampler
        self.codec = codec
        self.rows = rows
        self.timing = Timing()
        self._model = model
        said = Conditions(text=text, negative=negative)
        self._text = None if text is None else sampler.encode(model, jax.tree.map(jnp.asarray, said)).text
        # Frames cross to the host; everything that comes in is placed explicitly, so that a transfer guard can stay on.
        mesh = jax.sharding.get_mesh()
        self._place = partial(jax.device_put, device=None if mesh.empty else NamedSharding(mesh, PartitionSpec()))
        self._label = None if model.config.classes is None else self._place(np.zeros(rows, np.int32))
        self._compiled: dict[Any, Any] = {}
        self._begin = jax.jit(self._first_state)
        self._state, self._codec_state = self._fresh(0)
        # What the host knows of all sessions: ticks until a chunk leaves, and frames of it that do not exist.
        self._ramp, self._lead = 0, 0
        if compile_now:
            self.warm_up()

    # ------------------------------------------------------------------------------------------------------ sessions

    def open(
        self, seed: int = 0, given: np.ndarray | None = None, actions: np.ndarray | None = None, label: Any = None
    ) -> np.ndarray | None:
        """Starts all sessions anew.

        Args:
            seed: Seed of the first session; the others count on from it.
            given: Pixels of given frames, uint8 `[rows, g, h, w, 3]`, whole chunks, or None to start from noise.
            actions: Actions of the given frames `[rows, g, ...]`; None for no action.
            label: Class of each session `[rows]`, or one for all, where the network has classes.

        Returns:
            The given frames as the codec shows them, or None.

        Raises:
            ConfigError: The frames are not whole chunks, or have the wrong size or type, or the class is unknown;
                running sessions go on.
        """
        if not isinstance(seed, int | np.integer):
            raise ConfigError(f"seed={seed!r} must be a whole number")
        labels = row_labels(label, self._model.config.classes, self.rows)
        placed_label = None if labels is None else self._place(labels)
        if given is None:
            if self.sampler.first:
                raise ConfigError("independent_first_frame: give the first frame of the stream")
            self._state, self._codec_state = self._fresh(seed)
            self._label = placed_label
            self._ramp, self._lead = self.sampler.program.delay, self.codec.config.frames_per_latent - 1
            return None
        pixels = np.asarray(given)
        height, width = self._size
        wanted = (self.rows, height, width, 3)
        if pixels.ndim != 5 or (pixels.shape[0], *pixels.shape[2:]) != wanted or not pixels.shape[1]:
            raise ConfigError(
                f"given frames {list(pixels.shape)} should be [{self.rows}, frames, {height}, {width}, 3] pixels"
            )
        if pixels.dtype != np.uint8:
            raise ConfigError(f"given frames are {pixels.dtype}, they should be uint8 pixels")
        latent_frames = self.codec.config.latent_frames(pixels.shape[1])
        conditions = Conditions(self._text, self._actions(actions, latent_frames), placed_label)
        placed = self._place(pixels)
        # Compiling refuses frames that are not whole chunks; only then are the running sessions given up.
        given_to = self._model, self.codec, placed, conditions
        self._ready("prefill", pixels.shape[1], self._state, self._codec_state, *given_to)
        fresh = self._fresh(seed)
        self._label = placed_label
        self._state, self._codec_state = self._run("prefill", pixels.shape[1], *fresh, *given_to)
        self._ramp, self._lead = self.sampler.program.delay, 0
        return pixels

    def tick(self, actions: np.ndarray | None = None) -> jax.Array | None:
        """Generates the next chunk of every session.

        Args:
            actions: Actions on the way into each new frame, `[rows, chunk, ...]` or one value for all; None for none.

        Returns:
            uint8 frames `[rows, f, h, w, 3]` on the device, not waited for; None while a pipelined plan ramps up.
        """
        conditions = Conditions(self._text, self._actions(actions, self.sampler.chunk), self._label)
        self._state, latents = self._run("tick", None, self._state, self._model, conditions)
        if self._ramp:
            self._ramp -= 1
            return None
        self._codec_state, frames = self._run("decode", None, self._codec_state, self.codec, latents)
        lead, self._lead = self._lead, 0
        return self._run("trim", lead, frames) if lead else frames

    def frames(self, actions: Iterator[Any], ahead: int = 1) -> Iterator[np.ndarray]:
        """Streams chunks of pixels.

        Args:
            actions: One entry per tick, as `tick` takes them; the stream ends with it.
            ahead: Ticks dispatched before a chunk is handed out: 1 keeps the device busy; 0, for a person whose next
                action depends on what the last one did, hands each out at once.

        Yields:
            uint8 frames `[rows, f, h, w, 3]` on the host; the ramp-up of a pipelined plan is left out.
        """
        pending: list[jax.Array] = []
        for action in actions:
            frames = self.tick(action)
            if frames is not None:
                pending.append(frames)
            if len(pending) > ahead:
                yield np.asarray(pending.pop(0))
        for frames in pending:
            yield np.asarray(frames)

    def block(self) -> None:
        """Waits for everything dispatched so far."""
        jax.block_until_ready((self._state, self._codec_state))

    # ----------------------------------------------------------------------------------------------------- snapshots

    def snapshot(self) -> dict[str, Any]:
        """Copies all sessions to the host; `restore` goes on from there, bit for bit.

        Returns:
            Arrays by name, for `restore` of an engine with the same sampler and rows.
        """
        state = replace(self._state, key=jax.random.key_data(self._state.key))
        arrays = {"state": jax.tree.leaves((state, self._label)), "codec": self._codec_state}
        return jax.device_get(arrays) | {"ahead": np.asarray([self._ramp, self._lead], np.int32)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes on from a snapshot.

        Args:
            snapshot: From `snapshot` of an engine with the same sampler and rows.

        Raises:
            ConfigError: It was made with another sampler or another number of rows.
        """
        template = replace(self._state, key=jax.random.key_data(self._state.key))
        leaves, tree = jax.tree.flatten((template, self._label))
        wanted = {"state": leaves, "codec": self._codec_state, "ahead": np.zeros(2, np.int32)}
        if _forms(snapshot) != _forms(wanted):
            raise ConfigError("this is no snapshot of an engine with the same model, window and number of sessions")
        state, self._label = jax.tree.unflatten(tree, [self._place(leaf) for leaf in snapshot["state"]])
        self._state = replace(state, key=jax.random.wrap_key_data(state.key))
        self._codec_state = jax.tree.map(self._place, snapshot["codec"])
        self._ramp, self._lead = snapshot["ahead"].tolist()

    # --------------------------------------------------------------------------------------------------- executables

    def warm_up(self, given: int | None = None) -> None:
        """Compiles and runs every executable once, so that the first frame of a session waits for none.

        Args:
            given: Given frames that sessions will start from; None for one chunk (or the first frame).
        """
        start = time.perf_counter()
        compiled = sum(self.timing.compile.values())
        count = given or self.codec.config.pixel_frames(1 if self.sampler.first else self.sampler.chunk)
        label = None if self._label is None else 0
        self.open(given=np.zeros((self.rows, count, *self._size, 3), np.uint8), label=label)
        for _ in range(self.sampler.program.delay):
            self.tick()
        self._lead = self.codec.config.frames_per_latent - 1
        self.tick()
        self.block()
        self._state, self._codec_state = self._fresh(0)
        self.timing.warm_up = time.perf_counter() - start - (sum(self.timing.compile.values()) - compiled)

    def lower(self) -> Any:
        """Lowers the tick without running anything, for inspection."""
        conditions = Conditions(self._text, self._actions(None, self.sampler.chunk), self._label)
        return self._jitted("tick").lower(self._state, self._model, conditions)

    def executable(self, name: str) -> Any:
        """The compiled `tick`, `decode`, `prefill` or `trim`."""
        return next(value for (kind, _), value in self._compiled.items() if kind == name)

    def _run(self, name: str, size: Any, *arguments: Any) -> Any:
        return self._ready(name, size, *arguments)(*arguments)

    def _ready(self, name: str, size: Any, *arguments: Any) -> Any:
        """The executable for arguments like these, compiled at its first use."""
        key = (name, size)
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = self._jitted(name).lower(*arguments).compile()
            self.timing.compile[name] = time.perf_counter() - start
        return self._compiled[key]

    def _jitted(self, name: str) -> Any:
        sampler = self.sampler

        def tick(state: State, model: Any, conditions: Conditions) -> tuple[State, jax.Array]:
            state, chunk = sampler.tick(model, state, conditions)
            return state, chunk.latents

        def decode(codec_state: Any, codec: Any, latents: jax.Array) -> tuple[Any, jax.Array]:
            codec_state, frames, _ = codec.decode_chunk(codec_state, latents)
            return codec_state, frames

        def prefill(
            state: State, codec_state: Any, model: Any, codec: Any, pixels: jax.Array, conditions: Conditions
        ) -> tuple[State, Any]:
            latents = codec.encode(pixels)
            return sampler.prefill(model, state, latents, conditions), codec.decode_chunk(codec_state, latents)[0]

        def trim(frames: jax.Array) -> jax.Array:
            return frames[:, self.codec.config.frames_per_latent - 1 :]

        donated = {"tick": (0,), "decode": (0,), "prefill": (0, 1), "trim": ()}
        functions = {"tick": tick, "decode": decode, "prefill": prefill, "trim": trim}
        return jax.jit(functions[name], donate_argnums=donated[name])

    def _fresh(self, seed: int) -> tuple[State, Any]:
        """State of all sessions and of the codec before the first frame."""
        return self._begin(self._place(np.uint32(seed % 2**32)))

    def _first_state(self, seed: jax.Array) -> tuple[State, Any]:
        idle = self._idle(self.sampler.chunk)
        actions = None if idle is None else jnp.asarray(idle)
        state = self.sampler.init(self._model, session_keys(seed, self.rows), actions=actions)
        return state, self.codec.init_state(self.rows, *self.sampler.latent[:2])

    @property
    def _size(self) -> tuple[int, int]:
        """Pixel height and width."""
        height, width = (size * self.codec.config.patch for size in self.sampler.latent[:2])
        return height, width

    def _idle(self, frames: int) -> np.ndarray | None:
        """No action, for `frames` frames of every session."""
        kind = self._model.config.actions
        if kind is None:
            return None
        if isinstance(kind, DiscreteActions):
            return np.zeros((self.rows, frames), np.int32)
        dtype = np.bool_ if isinstance(kind, MultiBinaryActions) else np.float32
        return np.zeros((self.rows, frames, kind.count), dtype)

    def _actions(self, actions: Any, frames: int) -> Any:
        idle = self._idle(frames)
        if idle is None:
            if actions is not None:
                raise ConfigError("actions were given, but the network takes none (model.actions is not set)")
            return None
        if actions is None:
            return self._place(idle)
        array = np.asarray(actions)
        if array.dtype.kind not in {"i": "iu", "b": "biu", "f": "iuf"}[idle.dtype.kind]:
            raise ConfigError(f"actions of type {array.dtype} should be {idle.dtype}")
        # A trailing shape, such as one value for all, is repeated; nothing is stretched.
        if array.shape != idle.shape[idle.ndim - array.ndim :]:
            raise ConfigError(f"actions {array.shape} should be {idle.shape}")
        kind = self._model.config.actions
        if isinstance(kind, DiscreteActions) and not np.all((array >= 0) & (array < kind.count)):
            raise ConfigError(f"actions {array.tolist()} should be in 0 … {kind.count - 1}")
        return self._place(np.ascontiguousarray(np.broadcast_to(array.astype(idle.dtype), idle.shape)))


def _forms(tree: Any) -> tuple[Any, list[Any]]:
    """Structure, shapes and types of a tree of arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(getattr(leaf, "shape", None), getattr(leaf, "dtype", None)) for leaf in leaves]
