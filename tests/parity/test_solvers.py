"""The stored trajectories of the multistep solvers against diffusers itself."""

import numpy as np
import pytest

from tests.golden import solvers as golden

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", golden.CASES)
def test_the_stored_trajectories_are_diffusers(name):
    with np.load(golden.ARRAYS) as file:
        expected = golden.thinned(golden.trajectory(name))
        np.testing.assert_allclose(file[name], expected, atol=1e-5 * np.abs(expected).max())
