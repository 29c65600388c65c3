"""Trained networks: with the systems that they were trained in, or as others publish them."""

from collections.abc import Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax

from vidar.checkpoint import load_item
from vidar.errors import CheckpointError
from vidar.interop.networks import open_transformer, published
from vidar.models.dit import DiT, DiTConfig
from vidar.models.lora import merge
from vidar.system.compose import System, compose
from vidar.system.config import system_config
from vidar.weights import SUFFIX, is_weights, load_weights, read_meta


def load(source: str | Path, role: str = "student") -> tuple[System, DiT]:
    """Loads a trained network with its system, from a run's directory or a weights file.

    Args:
        source: Directory of a run (with `checkpoints/`), or a `.safetensors` file.
        role: Which network; its average is taken where there is one.

    Returns:
        The system that it was trained in, and the network.

    Raises:
        CheckpointError: There is nothing to load, or it does not fit its own config.
    """
    source = Path(source)
    if source.suffix == SUFFIX:
        systems = read_meta(source).get("systems")
        if not isinstance(systems, dict):
            raise CheckpointError(f"{source}: not a weights file of vidar's (its header has no systems)")
        _check_role(source, role, systems)
        system = compose(system_config(systems[role]))
        template = jax.eval_shape(partial(system.build, role), jax.random.key(0))
        return system, load_weights(source, role, template)
    directory = source / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(
            f"{source}: neither a run's directory (with checkpoints/), nor a {SUFFIX} file of vidar's, nor a published "
            "model where one may stand"
        )
    meta = load_item(directory, "meta", None)
    if "config" not in meta:
        raise CheckpointError(f"{source}: its checkpoints do not say what they were trained with (meta has no config)")
    system = compose(system_config(meta["config"]))
    _check_role(source, role, [name for name, one in system.objective.roles.items() if one.optimizer is not None])
    template = jax.eval_shape(partial(system.trainable, role), jax.random.key(0))
    choice = system.roles[role]
    if choice.ema is not None:
        trained = load_item(directory, "ema", {role: template})[role]
    else:
        trained = load_item(directory, "state", {"networks": {role: template}})["networks"][role]
    if choice.lora is None:
        return system, trained
    return system, merge(_origin(choice.source, role, system.model_config(role))[1], trained)


def is_trained(path: Path) -> bool:
    """Whether `load` takes it: the directory of a run, or weights of vidar's."""
    return is_weights(path) or (path / "checkpoints").is_dir()


def load_start(source: str, role: str, config: DiTConfig) -> tuple[System | None, DiT]:
    """Loads what a role starts from, into the host's memory where there is a way: it may be larger than one device.

    Args:
        source: As `load` takes it, or a published transformer as `open_transformer` takes it.
        role: The role.
        config: What its network should be; of a published one it says the types, and the heads where no file does.

    Returns:
        The system that it was trained in, None for a published one; and the network.

    Raises:
        CheckpointError: There is nothing to load, or it is damaged.
    """
    try:
        host = jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the host out
        host = nullcontext()
    with host:
        return _origin(source, role, config)


def _origin(source: str, role: str, config: DiTConfig) -> tuple[System | None, DiT]:
    if is_trained(Path(source)) or published(source) is None:
        return load(source, _stored_role(source, role))
    return None, open_transformer(source, config.precision, config.head_dim).load()


def _stored_role(source: str, role: str) -> str:
    """Under which role a source keeps what a role starts from: files name their roles, of a run it is the student."""
    return "teacher" if role in ("teacher", "critic") and source.endswith(SUFFIX) else "student"


def _check_role(source: Path, role: str, known: Collection[str]) -> None:
    if role not in known:
        raise CheckpointError(f"{source}: holds no network {role!r}; it has {', '.join(known) or 'none'}")
