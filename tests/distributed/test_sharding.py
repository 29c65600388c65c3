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
    "self_forcing by SiD": [dict(fsdp=2, sequence=2, tensor=2)],
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


def test_codec_and_text_encoder_on_a_mesh_give_what_one_device_gives(run_python):
    """The decoder's frames are split by rows, and with them its memory; the text encoder's weights by heads and mlp.

    Six rows of latents do not split over four devices; those of all larger frames do.
    """
    code = """
        import json
        import jax, jax.numpy as jnp, numpy as np
        from tests.interop.test_wan import TEXT, loaded
        from tests.models.test_wan_vae import network
        from vidar.models.placement import logical_axes
        from vidar.sharding import MeshConfig, make_mesh, shardings

        rng = np.random.default_rng(0)
        codec, latents = network(), jnp.asarray(rng.normal(size=(1, 3, 6, 16, 4)), jnp.float32)
        text, tokens = loaded(TEXT), jnp.asarray(rng.integers(0, 50, (2, 24)), jnp.int32)
        lengths = jnp.asarray([24, 7], jnp.int32)

        def decode(codec, latents):
            return codec.decode_floats(latents)

        def encode(codec, latents):
            return codec.encode_floats(codec.decode_floats(latents))

        def states(text, tokens):
            return text(tokens, lengths)

        def run(mesh):
            with jax.set_mesh(mesh):
                sharded = jax.device_put(text, shardings(text, logical_axes, mesh))
                arguments = {decode: (codec, latents), encode: (codec, latents), states: (sharded, tokens)}
                compiled = {f: jax.jit(f).lower(*values).compile() for f, values in arguments.items()}
                outputs = [np.asarray(compiled[f](*values)) for f, values in arguments.items()]
                gate = sharded.blocks.gate.kernel[...]
                share = gate.addressable_shards[0].data.size / gate.size
                return outputs, compiled[decode].memory_analysis().temp_size_in_bytes, share

        one, memory, _ = run(make_mesh(MeshConfig(), jax.devices()[:1]))
        many, part, share = run(make_mesh(MeshConfig(sequence=4, tensor=2)))
        errors = [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(one, many)]
        print(json.dumps([errors, part / memory, share]))
    """
    errors, memory, share = json.loads(run_python(code, devices=8).splitlines()[-1])
    assert max(errors) < 1e-5
    assert memory < 0.5
    assert share == 1 / 8
