"""Every mesh computes what one device does: losses, gradients, ticks; and what a mesh cannot split is refused."""

import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.errors import ConfigError
from vidar.models.dit import DiT
from vidar.models.frames import Conditions, Frames
from vidar.models.presets import preset
from vidar.sharding import AXES, check_split

EIGHT = {
    "teacher_forcing": [dict(fsdp=2, sequence=2, tensor=2), dict(data=2, fsdp=2, tensor=2), dict(data=2, sequence=4)],
    "diffusion": [dict(data=2, sequence=2, tensor=2)],
    "self_forcing": [dict(fsdp=2, sequence=2, tensor=2)],
    "tick": [dict(fsdp=2, sequence=2, tensor=2), dict(data=4, tensor=2)],
    "pipelined tick": [dict(data=2, sequence=2, tensor=2)],
}
ALL = [dict(data=2, fsdp=2, sequence=2, tensor=2)]
SIXTEEN = {"teacher_forcing": ALL, "self_forcing": ALL, "tick": ALL}


@pytest.mark.parametrize(("devices", "cases"), [(8, EIGHT), (16, SIXTEEN)], ids=["8", "16"])
def test_meshes_compute_what_one_device_does(run_python, devices, cases):
    code = f"""
        import json
        from tests.distributed.sharded import errors
        print(json.dumps(errors({cases!r})))
    """
    found = json.loads(run_python(code, devices=devices, timeout=900).splitlines()[-1])
    assert len(found) == sum(map(len, cases.values()))
    assert {case: error for case, (error, _) in found.items() if not error <= 1e-5} == {}


def abstract_mesh(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, (AxisType.Auto,) * 4)


def forward(mesh, rows=8):
    """Traces a bidirectional pass of Wan 1.3B, 12 heads, under a mesh."""
    chosen = preset("wan_1_3b")
    layout = chunk_layout(3, 3)
    latents = jax.ShapeDtypeStruct((rows, 3, 60, 104, 16), jnp.float32)
    text = jax.ShapeDtypeStruct((rows, 512, 4096), jnp.float32)

    def run(key, latents, text):
        stream = Frames(latents, jnp.ones(latents.shape[:2]), layout)
        model = DiT(chosen.model, rngs=nnx.Rngs(key))
        return model((stream,), Conditions(text=text), visibility=Bidirectional()).predictions[0]

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.eval_shape(run, jax.random.key(0), latents, text)


def test_heads_that_do_not_divide_are_refused_with_what_would_fit():
    mesh = abstract_mesh(tensor=8)
    with pytest.raises(ConfigError, match=r"model\.heads=12 .* 8 shards of mesh tensor=8.*\[1, 2, 3, 4, 6, 12\]"):
        check_split(mesh, "heads", "model.heads", 12)
    with pytest.raises(ConfigError, match=r"heads of size 12 does not split over 8 shards.*\[1, 2, 3, 4, 6, 12\]"):
        forward(mesh)
    assert forward(abstract_mesh(tensor=4, fsdp=2)).shape == (8, 3, 60, 104, 16)


def test_tokens_and_rows_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"tokens of size 1560 does not split over 16 shards"):
        forward(abstract_mesh(sequence=16))
    with pytest.raises(ConfigError, match=r"batch of size 3 does not split over 4 shards"):
        forward(abstract_mesh(data=2, fsdp=2), rows=3)
