"""Meshes, rules and placements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vidar.errors import ConfigError
from vidar.sharding import AXES, MeshConfig, Rules, constrain, make_mesh, shardings


def test_one_device_mesh_has_auto_axes():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert mesh.size == 1


def test_mesh_that_does_not_match_the_devices():
    with pytest.raises(ConfigError, match=r"data=3, fsdp=1, sequence=1, tensor=1 needs 3 devices, there are 1"):
        make_mesh(MeshConfig(data=3), jax.devices()[:1])
    with pytest.raises(ConfigError, match="at most one of them -1"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match="must be positive"):
        MeshConfig(tensor=0)


def test_rules_translate_names():
    rules = Rules()
    assert rules.spec(("batch", "tokens", None)) == P(("data", "fsdp"), "sequence", None)
    assert rules.spec(("layers", "embed", "mlp")) == P(None, ("fsdp", "sequence"), "tensor")
    assert Rules(embed=None).spec(("embed", "heads")) == P(None, "tensor")


def test_rules_refuse_collisions_and_unknown_names():
    with pytest.raises(ConfigError, match="collide"):
        Rules().spec(("heads", "mlp"))
    with pytest.raises(ConfigError, match="collide"):
        Rules().spec(("batch", "embed"))
    with pytest.raises(ConfigError, match="did you mean 'tokens'"):
        Rules().spec(("token",))
    with pytest.raises(ConfigError, match="none of the mesh axes"):
        Rules(embed="model")


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.arange(4.0)
    assert constrain(x, "tokens") is x


def test_shardings_replicate_what_does_not_divide():
    device = jax.devices()[0]
    mesh = Mesh(np.array([device]).reshape(1, 1, 1, 1), AXES)
    abstract = jax.sharding.AbstractMesh((1, 4, 2, 2), AXES)
    tree = {name: jax.ShapeDtypeStruct((size, 6), jnp.float32) for name, size in dict(up=8, few=12, odd=7).items()}
    placed = shardings(tree, lambda path, leaf: ("embed", "mlp"), abstract)
    assert placed["up"].spec == P(("fsdp", "sequence"), "tensor")
    assert placed["few"].spec == P("fsdp", "tensor")
    assert placed["odd"].spec == P(None, "tensor")
    with pytest.raises(ConfigError, match=r"\['few'\]: 1 logical axes \('embed',\) for shape \(12, 6\)"):
        shardings(tree, lambda path, leaf: ("embed",), mesh)
    assert shardings(tree, lambda path, leaf: ("embed", None), mesh)["up"] == NamedSharding(
        mesh, P(("fsdp", "sequence"), None)
    )


def test_constrain_under_every_kind_of_mesh(run_python):
    run_python(
        """
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from vidar.errors import ConfigError
        from vidar.sharding import AXES, MeshConfig, constrain, make_mesh

        mesh = make_mesh(MeshConfig(data=-1, sequence=2))
        assert dict(mesh.shape) == dict(data=4, fsdp=1, sequence=2, tensor=1)
        x = jnp.arange(32.0).reshape(8, 4)

        def f(x):
            return constrain(x * 2.0, "batch", "tokens")

        with jax.set_mesh(mesh):
            y = jax.jit(f)(x)
            expected = NamedSharding(mesh, P(("data", "fsdp"), "sequence"))
            assert y.sharding.is_equivalent_to(expected, 2), y.sharding
            assert not y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2), y.sharding
            assert (y == x * 2).all()
            try:
                jax.jit(f)(x[:6])
                raise SystemExit("6 clips over 4 shards were accepted")
            except ConfigError as error:
                assert "batch of size 6 does not split over 4 shards" in str(error), error

            # Inside a shard_map over everything there is nothing left to constrain.
            z = jax.jit(jax.shard_map(f, in_specs=P("data"), out_specs=P("data")))(x)
            assert (z == x * 2).all()

        explicit = jax.make_mesh((4, 1, 2, 1), AXES, axis_types=(AxisType.Explicit,) * 4)
        with jax.set_mesh(explicit):
            y = jax.jit(f)(x)
            assert jax.typeof(y).sharding.spec == P(("data", "fsdp"), "sequence"), jax.typeof(y)
            assert (y == x * 2).all()

        try:
            make_mesh(MeshConfig(fsdp=3, tensor=-1))
            raise SystemExit("8 devices over fsdp=3 were accepted")
        except ConfigError as error:
            assert "needs a multiple of 3 devices, there are 8" in str(error), error
        """
    )
