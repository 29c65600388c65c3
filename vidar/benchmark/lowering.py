"""What a workload costs, without running it: FLOPs of its lowered layer, and memory on TPUs that need not be there.

Compilers count the body of a loop once and kernels as nothing, so FLOPs are counted where neither occurs: one layer of
one row, attention as dense products, times layers, rows and passes, and the ends. This room must not know clocks.
"""

import os
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from vidar.attention import kernels, rope
from vidar.attention.kernels import Pattern
from vidar.attention.visibility import CLEAN, TeacherForcing, Window, chunk_layout
from vidar.benchmark.workload import Workload
from vidar.errors import ConfigError
from vidar.models.dit import Block, DiT
from vidar.sharding import MeshConfig, make_mesh

_COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute")
# A process that only compiles must neither wait for the chips of this machine nor ask a cloud's metadata server.
_LIBTPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "2",
}


@dataclass(frozen=True)
class Memory:
    """Memory that an executable takes on each device, in bytes.

    Attributes:
        arguments: What it is called with.
        outputs: What it returns.
        aliased: Outputs that take the place of donated arguments.
        temporary: Everything in between, at its largest.
        code: The program.
        host: What waits in the host's memory, averages and offloaded contexts; not part of the total.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    code: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it, donated arguments once."""
        return self.arguments + self.outputs - self.aliased + self.temporary + self.code


@dataclass(frozen=True)
class Compiled:
    """An executable for devices that need not exist.

    Attributes:
        device: Kind of device.
        devices: Number of them.
        memory: Memory of each; None when it does not fit.
        complaint: What the compiler says when it does not fit.
        kernels: How often each custom TPU kernel is called, by name, such as `splash_mha_dq_no_residuals`.
        collectives: Number of each kind of exchange between devices.
        cache: Bytes of a device's share of the context cache; 0 for a training step.
        seconds: Time that compiling took.
    """

    device: str
    devices: int
    memory: Memory | None
    complaint: str
    kernels: dict[str, int]
    collectives: dict[str, int]
    cache: int
    seconds: float


def lowered_flops(workload: Workload) -> float:
    """FLOPs of one tick or step as the compiler counts them, by lowering only.

    Args:
        workload: What to count.

    Returns:
        FLOPs of one layer of one row with dense attention, times layers, passes and rows, plus embedding and head.
    """
    layer, ends = (_layer, _ends) if workload.bench == "stream" else (_graded_layer, _graded_ends)
    passes = workload.passes if workload.bench == "stream" else 1
    return workload.rows * passes * (workload.model.layers * layer(workload) + ends(workload))


def compile_for(workload: Workload, mesh: Mesh) -> Compiled:
    """Compiles the tick or the step.

    Args:
        workload: What to compile.
        mesh: Devices to compile for; they need not exist.

    Returns:
        What the compiler says.

    Raises:
        ConfigError: The mesh does not divide what it splits.
    """
    found = compiled(workload.program(mesh).lower(mesh), mesh)
    cache = cache_bytes(workload) // mesh.size if workload.bench == "stream" and found.memory is not None else 0
    return replace(found, cache=cache)


def compiled(lowered: Any, mesh: Mesh) -> Compiled:
    """Compiles what was lowered for a mesh whose devices need not exist.

    Args:
        lowered: What `jax.jit(...).lower` returned.
        mesh: The mesh.

    Returns:
        What the compiler says.
    """
    device, started = mesh.devices.flat[0].device_kind, time.perf_counter()
    try:
        executable = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(device, mesh.size, None, str(error).splitlines()[0], {}, {}, 0, time.perf_counter() - started)
    seconds = time.perf_counter() - started
    analysis, text = executable.memory_analysis(), executable.as_text()
    sizes = (getattr(analysis, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp"))
    host = sum(getattr(analysis, f"host_{name}_size_in_bytes") for name in ("argument", "temp"))
    memory = Memory(*sizes, analysis.generated_code_size_in_bytes, host)
    found = Counter(re.findall(rf"({'|'.join(_COLLECTIVES)})(?:-start)?\(", text))
    custom = Counter(re.findall(r'%(\w+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"', text))
    return Compiled(device, mesh.size, memory, "", dict(custom), dict(found), 0, seconds)


def described(found: Compiled, topology: str) -> str:
    """One line about an executable: what it was compiled for, and what it takes of each chip."""
    where = f"{found.device} x{found.devices} ({topology})"
    if found.memory is None:
        return f"{where}: does not fit: {found.complaint}"
    memory, gib = found.memory, 2**30
    exchanges = ", ".join(f"{count} {name}" for name, count in sorted(found.collectives.items())) or "no collectives"
    host = f", {memory.host / gib:.2f} GiB in the host's memory" if memory.host else ""
    return (
        f"{where}: fits, compiled in {found.seconds:.0f} s; {memory.total / gib:.2f} GiB a chip: "
        f"arguments {memory.arguments / gib:.2f}, temporaries {memory.temporary / gib:.2f}, "
        f"outputs {memory.outputs / gib:.2f} of which {memory.aliased / gib:.2f} in place "
        f"(cache {found.cache / gib:.2f}){host}; {sum(found.kernels.values())} TPU kernels; {exchanges}"
    )


def topology_mesh(name: str, axes: MeshConfig) -> Mesh:
    """A mesh over the chips of a TPU topology, to compile for; they need not exist.

    Args:
        name: Such as `v5e:2x4`; see `jax.experimental.topologies`.
        axes: Sizes of the mesh axes over all chips.

    Returns:
        The mesh.

    Raises:
        ConfigError: libtpu is not installed or knows no such topology, or the sizes do not fit it.
    """
    from jax.experimental import topologies

    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, OSError, NotImplementedError) as error:
        raise ConfigError(
            f"topology {name!r}: {str(error).splitlines()[0]}; "
            "names look like v5e:2x4, and libtpu must be installed (pip install libtpu)"
        ) from error
    return make_mesh(axes, devices)


def cache_bytes(workload: Workload) -> int:
    """Bytes of the context cache over all devices."""
    sampler, model = workload.sampler, workload.model
    tokens = sampler.geometry.capacity * sampler.tokens
    return 2 * model.layers * workload.rows * tokens * model.width * jnp.dtype(sampler.cache_dtype).itemsize


# -------------------------------------------------------------------------------------------------- FLOPs by lowering


def _flops(function: Any, *arguments: Any) -> float:
    # The gradient of jax's dense attention relies on implicit promotion, which a strict caller forbids.
    with jax.numpy_dtype_promotion("standard"):
        return float(jax.jit(function).lower(*arguments).cost_analysis()["flops"])


def _layer(workload: Workload) -> float:
    """FLOPs of one block over one chunk and the cached frames."""
    model, tokens = workload.model, workload.sampler.tokens
    cached = (workload.seen - workload.preset.chunk) * tokens
    dense = kernels.dense_call("xla")

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, past: Any) -> jax.Array:
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(past, (key, value), strict=True))
        return dense(query, keys, values, None, False)

    block, x, embedding, text = _block_arguments(workload, workload.preset.chunk)
    past = (jax.ShapeDtypeStruct((1, cached, model.heads, model.head_dim), x.dtype),) * 2

    def run(block: Block, x: Any, embedding: Any, text: Any, past: Any) -> Any:
        return _run_block(workload, block, x, embedding, lambda *qkv: attend(*qkv, past), text)

    return _flops(run, block, x, embedding, text, past)


def _graded_layer(workload: Workload) -> float:
    """FLOPs of one block forward and backward over a clean and a noisy clip, attention as dense segments."""
    layouts = tuple(chunk_layout(workload.clip, workload.preset.chunk, role=role) for role in (CLEAN, 0))
    visibility = TeacherForcing() if workload.window is None else TeacherForcing() & Window(workload.window)
    mask = Pattern(visibility, layouts).mask()
    block, x, embedding, text = _block_arguments(workload, 2 * workload.clip)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return kernels.segmented(query, key, value, mask, kernels.dense_call("xla"))

    def graded(block: Block, x: Any, embedding: Any, text: Any) -> Any:
        output, pull = jax.vjp(
            lambda *given: _run_block(workload, *given[:3], attend, given[3]), block, x, embedding, text
        )
        return pull(jax.tree.map(jnp.ones_like, output))

    return _flops(graded, block, x, embedding, text)


def _block_arguments(workload: Workload, frames: int) -> tuple[Any, ...]:
    """One block, its input, the modulation, and keys and values of text, as shapes."""
    model, tokens = workload.model, workload.sampler.tokens
    dtype = jnp.dtype(model.precision.compute)
    block = jax.eval_shape(lambda: Block(model, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((1, frames, tokens, model.width), dtype)
    parts = (6,) if model.modulation == "table" else ()
    embedding = jax.ShapeDtypeStruct((1, frames, *parts, model.width), jnp.float32)
    text = None
    if model.text:
        text = (jax.ShapeDtypeStruct((1, model.text.length, model.heads, model.head_dim), dtype),) * 2
    return block, x, embedding, text


def _run_block(workload: Workload, block: Block, x: Any, embedding: Any, attend: Any, text: Any) -> Any:
    model, (height, width, _) = workload.model, workload.latent
    frame = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    turn = rope.phases(frame, height // model.patch, width // model.patch, model.head_dim, model.rope)

    def attend_text(query: jax.Array) -> jax.Array:
        b, f, p, n, d = query.shape
        return kernels.dense_call("xla")(query.reshape(b, f * p, n, d), *text, None, False).reshape(query.shape)

    x, _, _ = block(x, embedding, turn, attend, attend_text if text else None, jnp.dtype(model.precision.compute))
    return x


def _ends(workload: Workload) -> float:
    """FLOPs of patch embedding and head over one chunk."""
    return _flops(_run_ends(workload), *_end_arguments(workload))


def _graded_ends(workload: Workload) -> float:
    """FLOPs of the same, forward and backward, over a clean and a noisy clip."""

    def graded(*arguments: Any) -> Any:
        output, pull = jax.vjp(_run_ends(workload), *arguments)
        return pull(jax.tree.map(jnp.ones_like, output))

    return _flops(graded, *_end_arguments(workload))


def _run_ends(workload: Workload) -> Any:
    dtype = jnp.dtype(workload.model.precision.compute)
    return lambda patch, head, patches, hidden: (patch(patches, dtype), head(hidden, dtype))


def _end_arguments(workload: Workload) -> tuple[Any, ...]:
    model = workload.model
    network = jax.eval_shape(lambda: DiT(model, rngs=nnx.Rngs(0)))
    dtype = jnp.dtype(model.precision.compute)
    frames = workload.preset.chunk if workload.bench == "stream" else 2 * workload.clip
    tokens = frames * workload.sampler.tokens
    patches = jax.ShapeDtypeStruct((1, tokens, model.channels * model.patch**2), dtype)
    hidden = jax.ShapeDtypeStruct((1, tokens, model.width), dtype)
    return network.patch, network.head, patches, hidden
