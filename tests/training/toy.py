"""A small regression with two networks and two phases, and batches that depend on nothing but their number."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vidar.objectives.protocol import Phase, Role
from vidar.sharding import MeshConfig, constrain
from vidar.training import OptimizerConfig, Run, TrainingConfig

WIDTH, LAYERS, BATCH, TOKENS = 16, 2, 16, 4


class Mlp(nnx.Module):
    """Residual blocks, stacked, between two projections."""

    def __init__(self, rngs):
        normal = nnx.initializers.normal(0.2)
        self.enter = nnx.Param(normal(rngs.params(), (WIDTH, WIDTH), jnp.float32))
        self.blocks = nnx.Dict(
            kernel=nnx.Param(normal(rngs.params(), (LAYERS, WIDTH, WIDTH), jnp.float32)),
            bias=nnx.Param(jnp.zeros((LAYERS, WIDTH), jnp.float32)),
        )
        self.leave = nnx.Param(normal(rngs.params(), (WIDTH, WIDTH), jnp.float32))

    def __call__(self, x_btm):
        def block(x_btm, weights):
            kernel, bias = weights
            return constrain(x_btm + jnp.tanh(x_btm @ kernel + bias[None, None]), "batch", "tokens", "mlp"), None

        x_btm, _ = jax.lax.scan(block, x_btm @ self.enter[...], (self.blocks["kernel"][...], self.blocks["bias"][...]))
        return x_btm @ self.leave[...]


def build(key):
    return Mlp(nnx.Rngs(key))


def logical_axes(path, leaf):
    names = {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")}
    kind = next((name for name in names if name in path), None)
    return names[kind] if kind else ("embed", "mlp")


@dataclass(frozen=True)
class Regression:
    """The critic learns the targets at every step, the generator at some (`every=0`: none), through the critic."""

    every: int = 5
    ema_start: int = 200
    noise: float = 0.0
    poison: tuple[int, ...] = ()
    poisoned: tuple[str, ...] = ("generator", "critic")
    critic_source: str = "init"
    trainable: Any = None

    @property
    def roles(self):
        return {
            "generator": Role(optimizer="generator", ema=0.9, ema_start=self.ema_start),
            "critic": Role(optimizer="critic", source=self.critic_source),
            "teacher": Role(source="somewhere", dtype="bfloat16"),
        }

    def init_aux(self):
        return {"seen": jnp.int32(0)}

    def phases(self, step):
        critic = Phase("critic", "critic", trainable=self.trainable)
        return (Phase("generator", "generator"), critic) if self.every and step % self.every == 0 else (critic,)

    def loss(self, phase, networks, aux, axes, batch, step, key):
        x_btm, y_btm = batch["x"], batch["y"]
        if self.noise:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
            x_btm = x_btm + self.noise * jax.vmap(lambda key: jax.random.normal(key, (TOKENS, WIDTH)))(keys)
        if phase == "generator":
            made_btm = networks["generator"](x_btm)
            teacher = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), networks["teacher"])
            taught_btm = teacher(x_btm)
            error_b = jnp.mean(
                (networks["critic"](made_btm) - y_btm) ** 2 + 0.1 * (made_btm - taught_btm) ** 2, axis=(1, 2)
            )
        else:
            error_b = jnp.mean((networks["critic"](x_btm) - y_btm) ** 2, axis=(1, 2))
        for bad in self.poison if phase in self.poisoned else ():
            error_b = jnp.where(step == bad, jnp.nan, error_b)
        even_b = (batch["index"] % 2 == 0).astype(jnp.float32)
        metrics = {"even:sum": jnp.sum(error_b * even_b), "even:count": jnp.sum(even_b), "largest": jnp.max(error_b)}
        return jnp.mean(error_b), (metrics, {"seen": aux["seen"] + jnp.int32(1)})


class Numbers:
    """Batch number n is a function of n alone; `log` receives the numbers that were read."""

    def __init__(self, rows=BATCH, offset=0, on_read=None):
        self.position = 0
        self._rows, self._offset, self._on_read = rows, offset, on_read

    def __next__(self):
        if self._on_read is not None:
            self._on_read(self.position)
        index = np.arange(BATCH, dtype=np.int32)[self._offset : self._offset + self._rows] + self.position * BATCH
        random = [np.random.default_rng(int(i)) for i in index]
        x_btm = np.stack([generator.standard_normal((TOKENS, WIDTH), np.float32) for generator in random])
        self.position += 1
        return {"x": x_btm, "y": np.roll(np.sin(x_btm), 1, axis=2), "index": index}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


@dataclass(frozen=True)
class Toy:
    """Makes runs that differ in what a test varies."""

    objective: Regression = field(default_factory=Regression)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(steps=12, log_every=4, save_every=4))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-2, weight_decay=0.01))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    numbers: Any = Numbers

    def run(self, **changes):
        run = Run(
            objective=self.objective,
            axes=None,
            build={"generator": build, "critic": build},
            logical_axes=logical_axes,
            batches={"main": self.numbers},
            prepare_batch=lambda raw: raw,
            training=self.training,
            optimizers={"generator": self.optimizer, "critic": self.optimizer},
            frozen={"teacher": build(jax.random.key(77))},
            mesh=self.mesh,
            meta={"name": "toy"},
        )
        return replace(run, **changes)


def arrays(tree):
    """Flattens to NumPy arrays by path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(left, right):
    """Bit for bit."""
    left, right = arrays(left), arrays(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)


def assert_close(left, right, tolerance=1e-5):
    """To rounding, relative to the largest entry of each array."""
    left, right = arrays(left), arrays(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        scale = max(np.abs(right[path]).max(), 1e-3)
        np.testing.assert_allclose(leaf, right[path], rtol=0, atol=tolerance * scale, err_msg=path)
