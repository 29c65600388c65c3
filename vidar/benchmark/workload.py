"""What is benchmarked: a preset's network under conditions, as functions with arguments that exist or are only shapes.

Weights, latents and text are random: the time of a step does not depend on them. This room knows networks, samplers and
the driver's step; it must not know clocks, compilers' reports or command lines.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vidar.attention.cache import ContextConfig
from vidar.attention.visibility import ChunkCausal, TeacherForcing, Window
from vidar.benchmark.report import Percentiles, Record
from vidar.devices import peak
from vidar.diffusion.levels import LevelsConfig
from vidar.diffusion.plan import Commit
from vidar.errors import ConfigError, check_range
from vidar.models import flops
from vidar.models.codecs.pixel import PixelCodec
from vidar.models.dit import DiT, DiTConfig
from vidar.models.frames import Batch, Conditions
from vidar.models.layers import DiscreteActions, MultiBinaryActions, Precision
from vidar.models.placement import logical_axes
from vidar.models.presets import Preset, preset
from vidar.objectives import teacher_forcing
from vidar.sampling.axes import Axes
from vidar.sampling.flight import State
from vidar.sampling.noise import session_keys
from vidar.sampling.rollout import Sampler
from vidar.sampling.solvers import FewStep
from vidar.sharding import Rules, check_split, shardings
from vidar.training.optimizers import OptimizerConfig, make_optimizer
from vidar.training.state import TrainState, by_path, initial_state, state_shardings
from vidar.training.step import StepSettings, make_phase_step, metric_names

_RULES = Rules()


@dataclass(frozen=True)
class Program:
    """A unit of work and what it is called with.

    Attributes:
        function: From the arguments to the next state, which is the donated argument's successor, and something small.
        make: Creates the arguments, under `jit` or `jax.eval_shape`.
        places: Where each argument lies: trees of shardings.
        donated: Position of the state among the arguments.
    """

    function: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    places: tuple[Any, ...]
    donated: int

    def lower(self, mesh: Mesh) -> Any:
        """Lowers the function for the mesh from shapes alone."""
        arguments = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(self.make),
            self.places,
        )
        outputs = (self.places[self.donated], None)
        jitted = jax.jit(self.function, donate_argnums=self.donated, out_shardings=outputs)
        # The abstract mesh alone: its devices may not exist, and nothing may be placed on them while tracing.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jitted.lower(*arguments)

    def arguments(self, mesh: Mesh) -> tuple[Any, ...]:
        """The arguments as arrays on the mesh."""
        with jax.set_mesh(mesh):
            return jax.jit(self.make, out_shardings=self.places)()


@dataclass(frozen=True)
class Workload:
    """One network at one resolution and how it runs: all that a figure depends on, but the device.

    Attributes:
        bench: A tick of a stream, or a teacher-forcing step on whole clips.
        name: A preset.
        window: Latent frames that a query sees at most; None for those of the preset's clips.
        steps: Solver steps of a chunk (stream).
        commit: How finished chunks enter the cache (stream): `extra_pass`, `fused` or `last_step`.
        rows: Sessions, or clips of a step.
        backend: Attention back end: `xla`, `cudnn` or `splash`.
        precision: Type of matrix products; a stream stores its weights and cache in it, too.
        pixels: Height and width in pixels; None for the preset's.
        decoder: Whether chunks are decoded to pixels (stream).
        remat: Whether the backward pass recomputes each block (train).
        ema: Whether the step keeps an average of the parameters (train).
        layers: Number of blocks; None for the preset's.
        frames: Latent frames of a clip; None for the preset's.
    """

    bench: Literal["stream", "train"]
    name: str = "tiny"
    window: int | None = None
    steps: int = 4
    commit: str = "extra_pass"
    rows: int = 1
    backend: str = "xla"
    precision: str = "bfloat16"
    pixels: tuple[int, int] | None = None
    decoder: bool = False
    remat: bool = False
    ema: bool = True
    layers: int | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "window", "layers", "frames"):
            check_range(name, getattr(self, name), least=1)
        for name, size in zip(("height", "width"), self.pixels or (), strict=False):
            check_range(name, size, least=1)
        if self.bench == "stream" and self.commit == "fused" and self.backend != "xla":
            raise ConfigError(
                f"commit=fused needs a mask, which backend={self.backend} does not lower: use backend=xla"
            )
        if self.clip % self.preset.chunk:
            raise ConfigError(f"clips of {self.clip} frames are not whole chunks of {self.preset.chunk}")
        ContextConfig(self.seen).check(self.preset.chunk)
        self.model.tokens(*self.latent[:2])
        if self.codec and self.bench == "train":
            raise ConfigError("a training step decodes nothing: leave the decoder out")

    # -------------------------------------------------------------------------------------------------------- numbers

    @property
    def preset(self) -> Preset:
        """The preset that it is named after."""
        return preset(self.name)

    @property
    def model(self) -> DiTConfig:
        """The network."""
        params = self.precision if self.bench == "stream" else "float32"
        precision = Precision(params=params, compute=self.precision)
        layers = self.layers or self.preset.model.layers
        return replace(self.preset.model, layers=layers, backend=self.backend, precision=precision, remat=self.remat)

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels or self.preset.pixels

    @property
    def latent(self) -> tuple[int, int, int]:
        """Height, width and channels of a latent frame."""
        chosen = self.preset
        scale = chosen.pixels[0] // chosen.height
        if any(size % scale for size in self.resolution):
            raise ConfigError(
                f"{self.resolution[0]}×{self.resolution[1]} pixels do not divide into latents of {scale}×{scale} "
                f"pixels, as preset {self.name!r} has them"
            )
        return self.resolution[0] // scale, self.resolution[1] // scale, chosen.model.channels

    @property
    def codec(self) -> PixelCodec | None:
        """What decodes chunks; None where they stay latents."""
        height, _, channels = self.latent
        codec = PixelCodec(self.resolution[0] // height)
        if self.decoder and codec.channels != channels:
            raise ConfigError(f"preset {self.name!r} has no decoder here: measure its network alone")
        return codec if self.decoder else None

    @property
    def clip(self) -> int:
        """Latent frames of a clip."""
        return self.frames or self.preset.frames

    @property
    def seen(self) -> int:
        """Latent frames that a query sees at most."""
        return self.window or self.clip

    @property
    def pixel_frames(self) -> int:
        """Pixel frames that one tick or step makes or consumes, over all rows."""
        chosen = self.preset
        return self.rows * (chosen.chunk if self.bench == "stream" else self.clip) * chosen.frames_per_latent

    @property
    def kind(self) -> str:
        """Solver steps and commit, or the objective."""
        if self.bench == "train":
            return "teacher_forcing, remat" if self.remat else "teacher_forcing"
        return {"extra_pass": f"{self.steps}+1", "fused": f"{self.steps}+1 fused", "last_step": f"{self.steps}"}[
            self.commit
        ]

    @property
    def passes(self) -> int:
        """Forwards of a chunk: solver steps, and its commit unless that is free."""
        return self.steps + (self.commit != "last_step")

    @property
    def shape(self) -> flops.Shape:
        """The numbers that the work depends on."""
        return flops.shape_of(self.model, *self.latent[:2])

    @property
    def chunks(self) -> list[int]:
        """Frames of each chunk of a training clip."""
        return [self.preset.chunk] * (self.clip // self.preset.chunk)

    @property
    def counted(self) -> flops.Flops:
        """Counted FLOPs of one tick or step."""
        if self.bench == "stream":
            return flops.chunk_flops(self.shape, self.preset.chunk, self.seen, self.passes).times(self.rows)
        return flops.training_flops(self.shape, "teacher_forcing", self.chunks, self.window).times(self.rows)

    @property
    def moved(self) -> float:
        """Counted bytes of one tick or step in bf16; a training step counts as three passes."""
        shape = self.shape
        if self.bench == "stream":
            weights = 2 * shape.parameters * self.passes
            return self.rows * (flops.chunk_bytes(shape, self.preset.chunk, self.seen, self.passes) - weights) + weights
        tokens = 2 * self.clip * shape.tokens_per_frame
        weights = 2 * shape.parameters
        return 3 * (self.rows * (flops.forward_bytes(shape, tokens, tokens) - weights) + weights)

    # ------------------------------------------------------------------------------------------------------- programs

    @property
    def sampler(self) -> Sampler:
        """How the network is sampled."""
        times = tuple(1000.0 * (self.steps - step) / self.steps for step in range(self.steps))
        return Sampler(
            visibility=ChunkCausal() & Window(self.seen),
            latent=self.latent,
            tokens=self.model.tokens(*self.latent[:2]),
            frames=self.clip,
            chunk=self.preset.chunk,
            solver=FewStep(times),
            commit=Commit(self.commit),
            context=ContextConfig(self.seen),
            cache_dtype=self.precision,
        )

    def first_state(self) -> State:
        """The stream's state before its first tick."""
        network = jax.eval_shape(self._network)
        return self.sampler.init(
            network, session_keys(0, self.rows), actions=self._conditions(self.preset.chunk).actions
        )

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ConfigError where the mesh does not divide heads, tokens or rows."""
        check_split(mesh, "attended", f"{self.name}.heads", self.model.heads)
        check_split(mesh, "tokens", "tokens a frame", self.sampler.tokens)
        check_split(mesh, "batch", "rows", self.rows)

    def program(self, mesh: Mesh) -> Program:
        """The tick or the step.

        Args:
            mesh: Mesh that it is to run on; its devices need not exist.

        Returns:
            The program.

        Raises:
            ConfigError: The mesh does not divide what it splits.
        """
        self.check_mesh(mesh)
        return self._tick(mesh) if self.bench == "stream" else self._step(mesh)

    def _tick(self, mesh: Mesh) -> Program:
        sampler = self.sampler

        def make() -> tuple[Any, State, Conditions]:
            model = self._network()
            return model, self.first_state(), sampler.encode(model, self._conditions(self.preset.chunk))

        def tick(model: Any, state: State, conditions: Conditions) -> tuple[State, jax.Array]:
            state, chunk = sampler.tick(model, state, conditions)
            return state, chunk.latents

        model, state, conditions = jax.eval_shape(make)
        places = (shardings(model, logical_axes, mesh), _places(state, mesh), _places(conditions, mesh))
        return Program(tick, make, places, 1)

    def _step(self, mesh: Mesh) -> Program:
        objective = teacher_forcing.TeacherForcing(ema=0.999 if self.ema else None)
        visibility = TeacherForcing() if self.window is None else TeacherForcing() & Window(self.window)
        axes = Axes(LevelsConfig(), visibility, self.sampler)
        (phase,) = objective.phases(0)

        def batch() -> Batch:
            latents = jax.random.normal(jax.random.key(1), (self.rows, self.clip, *self.latent))
            return Batch(latents, self._conditions(self.clip), jnp.arange(self.rows, dtype=jnp.int32))

        network = jax.eval_shape(self._network)
        # Traced for the mesh's devices, too: the back end asks for them.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            names = metric_names(objective, axes, phase, {}, {"student": network}, (), jax.eval_shape(batch))
        paths = {path: tuple(logical_axes(path, leaf)) for path, leaf in by_path(network).items()}
        optimizer = make_optimizer(OptimizerConfig(), paths)

        def first() -> TrainState:
            networks, optimizers = {"student": self._network()}, {"student": optimizer}
            return initial_state(networks, objective.roles, optimizers, (), {phase.name: names})

        places = state_shardings(jax.eval_shape(first), objective.roles, logical_axes, mesh, _RULES)
        settings = StepSettings(accumulate=1, log_every=1 << 30, rules=_RULES)
        update = make_phase_step(objective, axes, phase, optimizer, names, places, settings)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
            return update(state, {}, batch, jnp.int32(1), jnp.uint32(0))

        return Program(step, lambda: (first(), batch()), (places, _places(jax.eval_shape(batch), mesh)), 0)

    def _network(self) -> DiT:
        return DiT(self.model, rngs=nnx.Rngs(0))

    def _conditions(self, frames: int) -> Conditions:
        """Random text and idle actions, as far as the network takes them."""
        config = self.model
        text, actions = None, None
        if config.text:
            shape = (self.rows, config.text.length, config.text.width)
            text = jax.random.normal(jax.random.key(2), shape, jnp.dtype(self.precision))
        if isinstance(config.actions, DiscreteActions):
            actions = jnp.zeros((self.rows, frames), jnp.int32)
        elif config.actions:
            dtype = jnp.bool_ if isinstance(config.actions, MultiBinaryActions) else jnp.float32
            actions = jnp.zeros((self.rows, frames, config.actions.count), dtype)
        return Conditions(text=text, actions=actions)


def _places(tree: Any, mesh: Mesh) -> Any:
    """Placement of a state, conditions or a batch: caches by heads, everything by rows."""

    def axes(path: str, leaf: Any) -> tuple[str | None, ...]:
        if path.endswith((".keys", ".values")):
            return ("layers", "batch", "keys", "attended" if ".cache" in path else "heads", None)
        return ("batch", *(None,) * (leaf.ndim - 1)) if leaf.ndim else ()

    return shardings(tree, axes, mesh, _RULES)


def describe(
    workload: Workload, mesh: Mesh, warmup: int, measured: Percentiles | None, first_frame: float | None
) -> Record:
    """Puts a measurement, or what was only lowered, under its conditions.

    Args:
        workload: What was measured.
        mesh: Devices that it was measured on.
        warmup: Ticks or steps before the measurement.
        measured: Times; None when it was only lowered.
        first_frame: Milliseconds to the first frame; None for training.

    Returns:
        The record. The roofline counts bf16 peaks, so there is none in another precision.
    """
    kind = mesh.devices.flat[0].device_kind
    limits = peak(kind) if workload.precision == "bfloat16" else None
    flops_total, stream = workload.counted.total, workload.bench == "stream"
    roofline = None
    if limits is not None:
        seconds = flops.roofline_seconds(flops_total, workload.moved if stream else 0.0, limits)
        roofline = 1e3 * seconds / mesh.size
    return Record(
        bench=workload.bench,
        device=kind if mesh.size == 1 else f"{kind} x{mesh.size}",
        preset=workload.name,
        resolution=workload.resolution,
        batch=workload.rows,
        window=workload.seen,
        steps=workload.kind,
        precision=workload.precision,
        backend=workload.backend,
        decoder=workload.decoder,
        warmup=warmup,
        time=measured,
        frames=workload.pixel_frames,
        flops=flops_total,
        roofline=roofline,
        first_frame=first_frame,
        software=f"jax {jax.__version__}",
    )
