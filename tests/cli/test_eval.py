"""Names of results."""

import pytest

from vidar.cli.eval import _titles
from vidar.errors import ConfigError


def test_models_are_named_after_directories_and_files():
    assert _titles(["runs/run_v1.5", "weights/v1.5.safetensors"]) == ["run_v1.5", "v1.5"]
    with pytest.raises(ConfigError, match="--model: several are named run, as their results would be"):
        _titles(["run", "x/other", "x/same/run.safetensors"])
