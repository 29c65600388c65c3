"""The stored arrays of causal Wan against the implementation that makes them, and that one against diffusers."""

import numpy as np
import pytest

from tests.golden import causal as golden
from tests.golden.wan import DIT, weight
from tests.interop.test_causal import FP32, error
from tests.interop.test_sources import stored
from vidar.interop import networks

pytestmark = pytest.mark.parity


def test_the_stored_arrays_are_those_of_the_torch_implementation():
    expected = golden.arrays()
    with np.load(golden.ARRAYS) as file:
        assert set(file) == set(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(file[name], array, atol=1e-6, err_msg=name)


def test_without_a_mask_it_is_diffusers_transformer():
    """With a time for each frame, which diffusers takes for each token."""
    import torch
    from diffusers import WanTransformer3DModel

    weights = {name: weight(name, shape) for name, shape in golden.shapes().items()}
    found = networks.recognise(stored(weights), {"attention_head_dim": golden.HEAD}, FP32)
    fields = DIT | dict(in_channels=golden.LATENT[-1], out_channels=golden.LATENT[-1], num_layers=golden.LAYERS)
    theirs = WanTransformer3DModel(**fields).eval()
    theirs.load_state_dict({name: torch.tensor(one.read()) for name, one in found.converted("diffusers").items()})
    latents, time = golden.clean(6), golden.block_times(golden.Case(1, frames=6))
    with torch.no_grad():
        states = torch.from_numpy(latents).permute(0, 4, 1, 2, 3)
        times = torch.from_numpy(time).repeat_interleave(golden.TOKENS, 1)
        expected = theirs(states, times, torch.from_numpy(golden.text())).sample.permute(0, 2, 3, 4, 1).numpy()
    ours = golden.Transformer()
    velocity = ours(latents, time, ours.prompt(golden.text()), lambda _, *qkv: golden.attention(*qkv))
    assert error(velocity.numpy(), expected) <= 1e-5
    rounded = golden.Transformer("float32")
    again = rounded(latents, time, rounded.prompt(golden.text()), lambda _, *qkv: golden.attention(*qkv))
    assert error(again.numpy(), velocity.numpy()) <= 1e-6
