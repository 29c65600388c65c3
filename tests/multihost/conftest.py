"""The launches of one test compile the same programs."""

from tests.training.conftest import compiled_once as compiled_once
