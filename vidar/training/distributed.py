"""Start-up of a run over several processes.

It must be called before JAX touches a device. This module knows nothing of what is trained.
"""

import os

import jax

from vidar.errors import ConfigError


def initialize(distributed: bool | None = None) -> None:
    """Joins the other processes of the run, if there are any.

    The environment says who they are: `JAX_COORDINATOR_ADDRESS` with `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or what
    Slurm, Open MPI, Kubernetes and TPU pods set.

    Args:
        distributed: True joins and fails where the environment says nothing; False does not join; None joins where
            `JAX_COORDINATOR_ADDRESS` is set or Slurm started more than one task.

    Raises:
        ConfigError: The environment is incomplete, or the processes do not find each other.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if distributed is None:
        distributed = address is not None or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if not distributed:
        return
    numbers = {}
    if address is not None:
        for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
            value = os.environ.get(variable)
            if value is not None and not value.isdigit():
                raise ConfigError(f"{variable}={value!r} is not a number")
            numbers[name] = None if value is None else int(value)
    try:
        jax.distributed.initialize(address, **numbers)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"the processes of this run cannot join: {reason}; set JAX_COORDINATOR_ADDRESS=host:port, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start it by Slurm or on a TPU pod"
        ) from error
