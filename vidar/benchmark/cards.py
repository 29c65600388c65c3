"""What an experiment card costs in memory, by compiling its phases for devices that need not be there.

Nothing is loaded: networks, optimizers and batches are shapes. This room must not know clocks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vidar.benchmark.lowering import Compiled, compiled
from vidar.models.codecs.pixel import PixelCodec
from vidar.models.layers import DiscreteActions, MultiBinaryActions
from vidar.sharding import Rules, shardings
from vidar.training.experiment import RunConfig, abstract_run
from vidar.training.loop import make_program
from vidar.training.state import phases_of


def compile_card(config: RunConfig, mesh: Mesh) -> dict[str, Compiled]:
    """Compiles each phase of a card's training step.

    Args:
        config: System, data and training.
        mesh: Devices to compile for; they need not exist.

    Returns:
        What the compiler says of each phase.

    Raises:
        ConfigError: Choices contradict each other, or do not fit the mesh.
    """
    run = abstract_run(config)
    phases = phases_of(run.objective, config.training.steps)
    rows = NamedSharding(mesh, Rules().spec(("batch",)))
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in _batch(config).items()}
    # Traced for the mesh's devices: back ends ask for them, and nothing may be placed on them.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        frozen = {role: _placed(run, role, module, mesh) for role, module in run.frozen.items()}
        program = make_program(run, phases, frozen, {phase.batch: batch for phase in phases.values()}, mesh)
        replicated = NamedSharding(mesh, jax.sharding.PartitionSpec())
        advance, seed = (jax.ShapeDtypeStruct((), dtype, sharding=replicated) for dtype in (jnp.int32, jnp.uint32))
        leaves = jax.tree.leaves(program.abstract), jax.tree.leaves(frozen)
        return {
            name: compiled(program.steps[name, False].lower(*leaves, batch, advance, seed), mesh) for name in phases
        }


def _placed(run: Any, role: str, module: Any, mesh: Mesh) -> Any:
    """A frozen network's shapes, in its storage type and its place."""
    choice = run.objective.roles[role]
    places = shardings(module, run.logical_axes, mesh, choice.rules or run.rules)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(choice.dtype), sharding=place), module, places
    )


def _batch(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch as the driver gets it."""
    video, codec, model, rows = config.video, config.codec, config.model, config.data.batch
    longer = getattr(config.objective, "frames", None)
    frames = longer or video.frames
    found: dict[str, Any] = {"index": ((rows,), jnp.int32)}
    if isinstance(codec, PixelCodec):
        found["pixels"] = (rows, frames, video.height, video.width, 3), jnp.uint8
    else:
        found["latents"] = (rows, frames, *codec.latent_size(video.height, video.width), codec.channels), jnp.float32
    if model.text is not None:
        tokens = (rows, model.text.length)
        found["text"] = (tokens, jnp.int32) if model.text.encoder else ((*tokens, model.text.width), jnp.float32)
        found |= {"negative": found["text"]} if config.negative is not None else {}
    if isinstance(model.actions, DiscreteActions):
        found["actions"] = (rows, frames), jnp.int32
    elif model.actions is not None:
        kind = jnp.bool_ if isinstance(model.actions, MultiBinaryActions) else jnp.float32
        found["actions"] = (rows, frames, model.actions.count), kind
    if model.classes:
        found["label"] = (rows,), jnp.int32
    return {name: jax.ShapeDtypeStruct(*entry) for name, entry in found.items()}
