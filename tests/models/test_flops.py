"""Counted work against the published roofline and against counting by hand."""

import itertools
import math

import jax
import pytest
from flax import nnx

from vidar import ConfigError
from vidar.devices import peak
from vidar.models.dit import DiT
from vidar.models.flops import (
    Shape,
    chunk_bytes,
    chunk_flops,
    forward_flops,
    roofline_seconds,
    shape_of,
    training_flops,
    visible_pairs,
)
from vidar.models.presets import preset

WAN = Shape(1536, 8960, 30, 12, 1560, 16, 16, text_tokens=512, text_width=4096)
WAN_14B = Shape(5120, 13824, 40, 40, 1560, 16, 16, text_tokens=512, text_width=4096)


@pytest.mark.parametrize(
    ("shape", "window", "tflop"),
    [(WAN, 3, 80.9), (WAN, 12, 141.5), (WAN, 21, 202.0), (WAN_14B, 6, 749), (WAN_14B, 12, 928), (WAN_14B, 21, 1197)],
)
def test_chunks_cost_what_the_roofline_says(shape, window, tflop):
    flops = chunk_flops(shape, 3, window, 4 + 1)
    assert flops.total / 1e12 == pytest.approx(tflop, rel=5e-4)


def test_parts_of_a_chunk():
    flops = chunk_flops(WAN, 3, 21, 5)
    assert (flops.linear + flops.ends) / 1e12 == pytest.approx(58.5, abs=0.05)
    assert flops.attention / 1e12 == pytest.approx(141.3, abs=0.05)
    assert flops.cross_attention / 1e12 == pytest.approx(2.21, abs=0.005)
    assert forward_flops(WAN, 32760, 32760).total / 1e12 == pytest.approx(283, abs=0.5)


def test_parameters():
    assert WAN.parameters / 1e9 == pytest.approx(1.419, rel=1e-3)
    assert WAN_14B.parameters / 1e9 == pytest.approx(14.288, rel=1e-3)
    nfd = Shape(1024, 4096, 16, 16, 336, 16, 16, (1, 1, 1), layer_modulation=True)
    assert nfd.parameters / 1e6 == pytest.approx(305, abs=1)


@pytest.mark.parametrize(
    ("device", "window", "milliseconds"),
    [
        ("NVIDIA H100 80GB HBM3", 12, 142.9),
        ("NVIDIA H200", 12, 142.9),
        ("NVIDIA H200", 21, 204.1),
        ("NVIDIA B200", 21, 89.8),
    ],
)
def test_time_of_a_compute_bound_chunk(device, window, milliseconds):
    moved, flops = chunk_bytes(WAN, 3, window, 5), chunk_flops(WAN, 3, window, 5)
    assert 1e3 * roofline_seconds(flops.total, moved, peak(device)) == pytest.approx(milliseconds, rel=1e-3)


def test_bytes_of_a_chunk():
    assert chunk_bytes(WAN, 3, 12, 5) / 1e9 == pytest.approx(87.5, abs=0.05)
    assert chunk_bytes(WAN, 3, 21, 5) / 1e9 == pytest.approx(100.4, abs=0.05)
    assert 1e3 * roofline_seconds(0.0, chunk_bytes(WAN, 3, 21, 5), peak("NVIDIA H200")) == pytest.approx(20.9, abs=0.05)


def seen(pattern: str, sizes: list[int], window: int | None) -> int:
    """Counts visible pairs frame by frame."""
    if pattern == "bidirectional":
        return sum(sizes) ** 2
    chunk_of = [chunk for chunk, size in enumerate(sizes) for _ in range(size)]
    ends = list(itertools.accumulate(sizes))

    def within(q: int, k: int) -> bool:
        return window is None or k >= ends[chunk_of[q]] - window

    frames = range(len(chunk_of))
    clean = sum(chunk_of[k] <= chunk_of[q] and within(q, k) for q in frames for k in frames)
    if pattern == "chunk_causal":
        return clean
    context = sum(chunk_of[k] < chunk_of[q] and within(q, k) for q in frames for k in frames)
    return clean + context + sum(size * size for size in sizes)


@pytest.mark.parametrize("pattern", ["bidirectional", "chunk_causal", "teacher_forcing"])
@pytest.mark.parametrize(("sizes", "window"), [([3] * 7, None), ([3] * 7, 12), ([1, 4, 4], None), ([1] * 6, 3)])
def test_visible_pairs_are_counted_exactly(pattern, sizes, window):
    frames, pairs = visible_pairs(pattern, sizes, window)
    assert frames == sum(sizes) * (2 if pattern == "teacher_forcing" else 1)
    assert pairs == seen(pattern, sizes, window)


def test_training_is_three_forwards_over_the_visible_pairs():
    bidirectional = training_flops(WAN, "bidirectional", [3] * 7)
    assert bidirectional.total == pytest.approx(3 * forward_flops(WAN, 32760, 32760).total)
    causal = training_flops(WAN, "chunk_causal", [3] * 7)
    assert causal.linear == bidirectional.linear
    assert causal.attention / bidirectional.attention == pytest.approx(28 / 49)  # 1 + … + 7 chunks of 7 * 7
    teacher = training_flops(WAN, "teacher_forcing", [3] * 7)
    assert teacher.linear == 2 * causal.linear
    assert teacher.attention == pytest.approx(2 * causal.attention)


@pytest.mark.parametrize("name", ["small", "nfd_310m", "wan_1_3b", "wan_14b"])
def test_presets_have_the_parameters_that_are_counted(name):
    chosen = preset(name)
    shape = shape_of(chosen.model, chosen.height, chosen.width)
    network = jax.eval_shape(lambda key: DiT(chosen.model, rngs=nnx.Rngs(key)), jax.random.key(0))
    built = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(network))
    assert shape.parameters == pytest.approx(built, rel=1e-2)  # without biases and actions


def test_the_wan_preset_has_the_published_shape():
    chosen = preset("wan_1_3b")
    assert shape_of(chosen.model, chosen.height, chosen.width) == WAN


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="heads=5"):
        Shape(64, 256, 2, 5, 16, 4, 4)


def test_unknown_patterns_are_refused():
    with pytest.raises(ConfigError, match="bidirectional, chunk_causal, teacher_forcing"):
        training_flops(WAN, "causal", [3])
