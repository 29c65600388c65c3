"""One of two processes that train the toy together: `python -m tests.multihost.worker <workdir> <steps> <term at>`."""

import os
import signal
import sys

import jax
import numpy as np

from tests.training.toy import BATCH, Numbers, Regression, Toy, arrays
from vidar.sharding import MeshConfig
from vidar.training import TrainingConfig, train
from vidar.training.distributed import initialize


def main(workdir, steps, term_at):
    initialize()
    assert jax.process_count() == 2
    rows = BATCH // 2

    def on_read(position):
        if position == term_at and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    toy = Toy(
        objective=Regression(every=2, noise=0.3, ema_start=1),
        training=TrainingConfig(steps=steps, log_every=2, save_every=4, tensorboard=False),
        mesh=MeshConfig(data=2, fsdp=2),
        numbers=lambda: Numbers(rows=rows, offset=rows * jax.process_index(), on_read=on_read),
    )
    state = train(toy.run(), workdir)
    gathered = jax.jit(lambda tree: tree, out_shardings=jax.sharding.NamedSharding(state_mesh(state), jax.P()))(
        state.networks
    )
    if jax.process_index() == 0:
        np.savez(f"{workdir}/networks.npz", **arrays(gathered))
    print("stopped at", int(state.step))


def state_mesh(state):
    return jax.tree.leaves(state.networks)[0].sharding.mesh


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
