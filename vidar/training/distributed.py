"""Start-up of a run over several processes, and the lock that keeps other runs out of its directory.

This module knows nothing of what is trained.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from vidar.errors import ConfigError


def initialize(distributed: bool | None = None) -> None:
    """Joins the other processes of the run, if there are any; call it before JAX touches a device.

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


@contextmanager
def only_process(directory: Path) -> Iterator[None]:
    """Holds a run's directory; the lock ends with the process, however that ends.

    Args:
        directory: The run's directory; it is made.

    Raises:
        ConfigError: Another run of this machine holds it, or it cannot be made.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be the directory of a run: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # anything else is a file system without locks
            os.close(lock)
            raise ConfigError(f"{directory}: another process trains here; wait for it, or use another one") from error
    try:
        yield
    finally:
        os.close(lock)
