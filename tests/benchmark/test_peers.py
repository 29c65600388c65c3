"""Comparisons with other implementations: what is kept of them, and that nothing is timed that does not agree."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from vidar.benchmark import peers
from vidar.benchmark.peers import Comparison
from vidar.cli.main import main
from vidar.errors import ConfigError, DataError

ONE = Comparison(
    "a network", "cpu", "float32", 1e-6, {"vidar": 50.0, "diffusers": 100.0}, 2.0, {"products": 40.0}, "jax 1"
)


def test_a_newer_comparison_replaces_the_older_one_of_the_same_network(tmp_path):
    peers.merge(ONE, tmp_path)
    peers.merge(replace(ONE, network="another"), tmp_path)
    path = peers.merge(replace(ONE, ratio=3.0), tmp_path)
    found = path.read_text()
    assert found.count('"network"') == 2
    assert found.count("3.0") == 1
    path.write_text("{")
    with pytest.raises(DataError, match="not a file of comparisons"):
        peers.merge(ONE, tmp_path)


def test_the_table_says_who_was_faster_and_where_the_time_went():
    text = peers.table([ONE])
    assert "vidar 50 ms, diffusers 100 ms; ratio 2.00" in text
    assert "products 40 ms (jax 1; outputs differ by 1.0e-06)" in text


def test_implementations_take_turns_and_must_agree():
    runs = []

    def implementation(name, value):
        def run():
            runs.append(name)
            return np.full((2,), value, np.float32)

        return run

    def compare(other):
        given = {"vidar": implementation("vidar", 1.0), "diffusers": implementation("diffusers", other)}
        return peers._compare("a network", given, 2, dict, "jax 1")

    found = compare(1.0001)
    assert runs == ["vidar", "diffusers"] * 3
    assert found.ratio == found.milliseconds["diffusers"] / found.milliseconds["vidar"]
    with pytest.raises(ConfigError, match="outputs differ by 1.0e-02"):
        compare(1.0 / 0.99)


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["bench", "peers"]) == 2
    assert "pip install -e '.[parity]'" in capsys.readouterr().err
