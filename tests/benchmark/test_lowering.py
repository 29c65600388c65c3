"""Counted FLOPs against the published roofline and against the compiler's own count, by lowering only."""

from dataclasses import replace

import pytest

from vidar.benchmark.lowering import cache_bytes, lowered_flops
from vidar.benchmark.workload import Workload
from vidar.models.presets import PRESETS


@pytest.mark.parametrize(("window", "tflop"), [(12, 141.5), (21, 202.0)])
def test_a_chunk_of_wan_is_counted_as_published_and_lowered_as_counted(window, tflop):
    workload = Workload("stream", "wan_1_3b", window=window)
    assert workload.kind == "4+1"
    assert workload.counted.total / 1e12 == pytest.approx(tflop, abs=0.05)
    assert lowered_flops(workload) == pytest.approx(workload.counted.total, rel=0.1)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("bench", ["stream", "train"])
def test_every_preset_is_lowered_as_counted(bench, name):
    workload = Workload(bench, name)
    assert lowered_flops(workload) == pytest.approx(workload.counted.total, rel=0.1)


@pytest.mark.parametrize("window", [None, 9])
def test_a_training_step_of_wan_is_lowered_as_counted(window):
    workload = Workload("train", "wan_1_3b", window=window, rows=2)
    assert lowered_flops(workload) == pytest.approx(workload.counted.total, rel=0.02)


def test_the_lowered_count_sees_what_is_computed():
    """Each change moves the lowered count on its own, by what it should."""
    base = Workload("stream", "small", window=12)
    flops = lowered_flops(base)
    assert lowered_flops(replace(base, rows=3)) == pytest.approx(3 * flops)
    assert lowered_flops(replace(base, commit="last_step")) == pytest.approx(4 / 5 * flops)
    assert lowered_flops(replace(base, layers=24)) == pytest.approx(2 * flops, rel=1e-2)
    # 12 more cached frames of 336 tokens: four FLOPs for each query, key and channel, in five passes of 12 layers.
    wider = lowered_flops(replace(base, window=24)) - flops
    assert wider == pytest.approx(4 * 336 * 12 * 336 * 768 * 5 * 12, rel=0.05)


def test_bytes_of_the_cache():
    """3.45 GB at 12 frames of Wan 1.3B; a window of 12 frames holds 9 past ones."""
    workload = Workload("stream", "wan_1_3b", window=12)
    assert cache_bytes(workload) / 1e9 == pytest.approx(3.45 * 9 / 12, abs=0.01)
    assert workload.moved / 1e9 == pytest.approx(87.5, abs=0.05)
