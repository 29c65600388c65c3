"""Optimizers by name, over parameters as a flat dictionary from path to array.

Flat, because then an optimizer's state names each parameter by its path, from which its placement and its trainability
follow; and because no optimizer needs to know modules. This module must not know networks, phases or meshes.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from vidar.errors import ConfigError, check_range

Parameters = dict[str, jax.Array]


@dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer; its unit of time is its own updates.

    Attributes:
        name: `adamw`; `muon` for the matrices of stacked blocks (Nesterov Adam for the rest); or `sgd` with momentum.
        learning_rate: Peak learning rate.
        schedule: After the warm-up, `constant` or `cosine` down to `final_fraction`.
        warmup: Updates over which the learning rate grows linearly.
        decay_steps: Update at which the cosine ends, warm-up included.
        final_fraction: Share of the peak at the end of the cosine, in [0, 1].
        beta1: Decay of the first moment; of the momentum for muon and sgd.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay of matrices (of Muon's, for muon); vectors (biases, norms) are not decayed.
        clip: Largest global norm of the gradient; None does not clip.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    learning_rate: float = 1e-4
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    decay_steps: int | None = None
    final_fraction: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "warmup", "weight_decay"):
            check_range(name, getattr(self, name), least=0)
        for name in ("beta1", "beta2"):
            check_range(name, getattr(self, name), least=0, below=1)
        check_range("final_fraction", self.final_fraction, least=0, most=1)
        check_range("eps", self.eps, above=0)
        if self.schedule == "cosine" and (self.decay_steps is None or self.decay_steps <= self.warmup):
            raise ConfigError(
                f"decay_steps={self.decay_steps}: a cosine schedule needs the update at which it ends, "
                f"after its warm-up of {self.warmup}"
            )
        check_range("clip", self.clip, above=0)


@dataclass(frozen=True)
class Optimizer:
    """A gradient transformation and the learning rate that scales what it returns.

    The rate stands apart from the transformation so that it can be logged, whichever the transformation.

    Attributes:
        transform: From gradients to a direction.
        schedule: From the number of updates done to the learning rate.
    """

    transform: optax.GradientTransformation
    schedule: optax.Schedule

    def init(self, parameters: Parameters) -> dict[str, Any]:
        """Returns the initial state: the update count and the transformation's own state."""
        with _promotion_of_optax():
            return {"count": jnp.int32(0), "transform": self.transform.init(parameters)}

    def update(
        self, gradients: Parameters, state: dict[str, Any], parameters: Parameters
    ) -> tuple[Parameters, dict[str, Any], jax.Array]:
        """Computes one update.

        Args:
            gradients: By parameter path.
            state: From `init` or the previous update.
            parameters: By parameter path.

        Returns:
            What is to be added to the parameters, the next state, and the learning rate used.
        """
        rate = jnp.asarray(self.schedule(state["count"]), jnp.float32)
        with _promotion_of_optax():
            direction, inner = self.transform.update(gradients, state["transform"], parameters)
        # Optax already points downhill: its transformations were built with a learning rate of 1.
        updates = jax.tree.map(lambda x: x * rate.astype(x.dtype), direction)
        return updates, {"count": state["count"] + 1, "transform": inner}, rate


def make_optimizer(config: OptimizerConfig, axes: Mapping[str, Sequence[str | None]]) -> Optimizer:
    """Builds an optimizer for the parameters of one network.

    Args:
        config: Choices.
        axes: Logical axes of every parameter, by path; they tell matrices from stacked vectors.

    Returns:
        The optimizer.
    """

    def decayed(parameters: Any) -> dict[str, bool]:
        return {path: len(_without_layers(axes[path])) >= 2 for path in parameters}

    def dimensions(parameters: Any) -> Any:
        return {path: _muon_dimensions(axes[path]) for path in parameters}

    if config.name == "adamw":
        transform = optax.adamw(
            1.0, config.beta1, config.beta2, config.eps, weight_decay=config.weight_decay, mask=decayed
        )
    elif config.name == "muon":
        transform = optax.contrib.muon(
            1.0,
            beta=config.beta1,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=dimensions,
        )
    else:
        transform = optax.chain(
            optax.trace(config.beta1), optax.add_decayed_weights(config.weight_decay, decayed), optax.scale(-1.0)
        )
    if config.clip is not None:
        transform = optax.chain(optax.clip_by_global_norm(config.clip), transform)
    return Optimizer(transform, make_schedule(config))


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Builds the learning rate as a function of the number of updates done, in [0, `learning_rate`]."""

    def schedule(count: Any) -> Any:
        done = jnp.asarray(count, jnp.float32)
        rate = jnp.float32(config.learning_rate)
        if config.schedule == "cosine" and config.decay_steps is not None:
            progress = jnp.clip((done - config.warmup) / (config.decay_steps - config.warmup), 0.0, 1.0)
            falling = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
            rate = rate * (config.final_fraction + (1.0 - config.final_fraction) * falling)
        return rate * jnp.minimum(1.0, (done + 1.0) / config.warmup) if config.warmup else rate

    return schedule


def _promotion_of_optax() -> AbstractContextManager[None]:
    """Optax relies on implicit promotion, which a strict caller forbids."""
    return jax.numpy_dtype_promotion("standard")


def _without_layers(axes: Sequence[str | None]) -> list[int]:
    """Returns the positions of a parameter's axes that are not the stack of blocks."""
    return [position for position, axis in enumerate(axes) if axis != "layers"]


def _muon_dimensions(axes: Sequence[str | None]) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns which axes of a stacked matrix Muon orthogonalises; None leaves the parameter to AdamW."""
    own = _without_layers(axes)
    if len(own) == len(axes) or len(own) != 2:
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=own[0], output_axis=own[1])
