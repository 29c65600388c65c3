"""Low-rank adapters (LoRA, arXiv 2106.09685): a product of two thin matrices beside each chosen kernel.

Adapters are a flat dictionary from parameter path to array, apart from the network that they belong to: so what is
trained is small, and what is frozen is stored once. This room must not know optimizers.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vidar.errors import ConfigError, check_range

Adapters = dict[str, jax.Array]
_END = ".value"


@dataclass(frozen=True)
class LoraConfig:
    """Which linear maps get an adapter, and how thick it is.

    Attributes:
        rank: Inner dimension; the adapter's product is added unscaled.
        targets: Names of the maps.
    """

    rank: int = 16
    targets: tuple[str, ...] = ("query", "key", "value", "output", "up", "down")

    def __post_init__(self) -> None:
        check_range("lora.rank", self.rank, least=1)


def init_adapters(network: Any, config: LoraConfig, key: jax.Array) -> Adapters:
    """Adapters of a network that change nothing yet.

    Args:
        network: The network, or its shapes.
        config: Which maps, and the rank.
        key: Source of the first factor's values; the second factor is zero.

    Returns:
        For each map `p`, `p.lora_in.value` `[..., inputs, rank]` and `p.lora_out.value` `[..., rank, outputs]`.

    Raises:
        ConfigError: The network has none of these maps.
    """
    adapters: Adapters = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(network):
        name = jax.tree_util.keystr(path)
        owner = name.removesuffix(f".kernel{_END}")
        if owner == name or owner.rpartition(".")[2] not in config.targets:
            continue
        *stack, inputs, outputs = leaf.shape
        draw = jax.random.normal(jax.random.fold_in(key, zlib.crc32(owner.encode())), (*stack, inputs, config.rank))
        adapters[f"{owner}.lora_in{_END}"] = (draw * inputs**-0.5).astype(leaf.dtype)
        adapters[f"{owner}.lora_out{_END}"] = jnp.zeros((*stack, config.rank, outputs), leaf.dtype)
    if not adapters:
        raise ConfigError(f"lora.targets={config.targets}: the network has no such linear maps")
    return adapters


def attach(network: Any, adapters: Mapping[str, jax.Array]) -> Any:
    """A network with its adapters in place; differentiable in both.

    Args:
        network: The network, which stays as it is.
        adapters: From `init_adapters`, or trained.

    Returns:
        A network of the same class that computes with them.
    """
    attached = jax.tree.map(lambda leaf: leaf, network)
    for path, value in adapters.items():
        *owners, name = path.removeprefix(".").removesuffix(_END).split(".")
        part: Any = attached
        for owner in owners:
            part = getattr(part, owner)
        setattr(part, name, nnx.data(nnx.Param(value)))
    return attached


def merge(network: Any, adapters: Mapping[str, jax.Array]) -> Any:
    """The network whose kernels hold the sum of what they were and their adapters' products, added in fp32."""

    def merged(path: Any, leaf: jax.Array) -> jax.Array:
        owner = jax.tree_util.keystr(path).removesuffix(f".kernel{_END}")
        inner = adapters.get(f"{owner}.lora_in{_END}")
        if inner is None:
            return leaf
        change = inner.astype(jnp.float32) @ adapters[f"{owner}.lora_out{_END}"].astype(jnp.float32)
        return (leaf.astype(jnp.float32) + change).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(merged, network)
