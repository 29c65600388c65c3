"""What an objective is: the contract between the losses and the driver.

An objective names the networks (roles) it needs, the phases of a training step, and the loss of each phase. It knows
the axes of the system (flow, levels, plan, visibility, guidance) and nothing of meshes, optimizers or disks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax

from vidar.errors import check_range
from vidar.models.lora import LoraConfig
from vidar.sharding import Rules

Networks = Mapping[str, Any]
Metrics = Mapping[str, jax.Array]
Aux = Any


@dataclass(frozen=True)
class Role:
    """One network that an objective needs.

    Attributes:
        source: Where its initial parameters come from: `"init"` (random), `"student"` (a copy of another role's
            initial parameters, by name), or a place: a run, weights of vidar's, or a published model.
        optimizer: Name of the entry of `config.optimizers` that trains it; None keeps it frozen and out of the state.
        ema: Decay of the exponential moving average in [0, 1), or None for no average.
        ema_start: Global step just before whose update the average starts as a copy of the parameters.
        ema_memory: Where the average waits between updates: on the `"device"`, or in its `"host"`'s memory.
        dtype: Storage type of frozen parameters.
        rules: Where its parameters lie; None for the run's rules.
        lora: Low-rank adapters that are trained in place of the parameters, which are then frozen; None trains them.
        wrap: From the role's network and a key to what is trained around it, such as discriminator heads.
    """

    source: str = "init"
    optimizer: str | None = None
    ema: float | None = None
    ema_start: int = 0
    ema_memory: Literal["device", "host"] = "device"
    dtype: str = "float32"
    rules: Rules | None = None
    lora: LoraConfig | None = None
    wrap: Callable[[Any, jax.Array], Any] | None = None

    def __post_init__(self) -> None:
        check_average(self.ema, self.ema_start)


@dataclass(frozen=True)
class Phase:
    """One donated, compiled update within a training step.

    Attributes:
        name: Name under which its metrics are logged.
        role: The role whose parameters it updates.
        trainable: Predicate on a parameter's path string (`.blocks.mlp.up.kernel.value`); False freezes it.
        batch: Which batch it consumes: phases of one step with equal names share one batch.
        reset_optimizer: Whether the role's optimizer state is reset before this update.
    """

    name: str
    role: str
    trainable: Callable[[str], bool] | None = None
    batch: str = "main"
    reset_optimizer: bool = False


def check_average(ema: float | None, ema_start: int) -> None:
    """Raises ConfigError where there is no such moving average."""
    check_range("objective.ema", ema, least=0, below=1)
    check_range("objective.ema_start", ema_start, least=0)


class OneUpdate:
    """What objectives share whose step is one update of the student, without auxiliary state."""

    def init_aux(self) -> Aux:
        """No auxiliary state."""
        return ()

    def phases(self, step: int) -> tuple[Phase, ...]:
        """One update a step."""
        return (Phase("student", "student"),)


class Objective(Protocol):
    """A frozen dataclass of hyper-parameters with the roles, phases and losses of one training method."""

    @property
    def roles(self) -> Mapping[str, Role]:
        """The networks needed, by name."""
        ...

    def init_aux(self) -> Aux:
        """Initial auxiliary state (a pytree, saved with the training state; `()` if none)."""
        ...

    def phases(self, step: int) -> tuple[Phase, ...]:
        """Phases of global step `step`, in order."""
        ...

    def loss(
        self, phase: str, networks: Networks, aux: Aux, axes: Any, batch: Any, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, Aux]]:
        """Scalar loss of one phase on one microbatch, with metrics and the next auxiliary state."""
        ...
