"""The table of peaks and what this process holds."""

import os

import jax
import numpy as np
import pytest

from vidar import devices


@pytest.mark.parametrize(
    ("kind", "flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 990e12, 3.35e12),
        ("NVIDIA H200", 990e12, 4.8e12),
        ("NVIDIA B200", 2250e12, 8e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.04e12),
        ("NVIDIA GeForce RTX 4090", 165e12, 1.01e12),
        ("TPU v5 lite", 197e12, 0.82e12),
        ("TPU v5p", 459e12, 2.77e12),
        ("TPU v5", 459e12, 2.77e12),
        ("TPU v6 lite", 918e12, 1.64e12),
    ],
)
def test_peaks(kind, flops, bandwidth):
    assert devices.peak(kind) == devices.Peak(flops, bandwidth)


def test_an_unknown_device_has_no_peak():
    assert devices.peak("cpu") is None
    assert devices.memory_in_use(jax.devices("cpu")[0]) is None
    assert devices.memory_peak(jax.devices("cpu")[0]) is None


def test_resident_memory_counts_touched_pages():
    before = devices.host_resident_memory()
    block = np.ones(100 * 2**20, np.uint8)
    grown = devices.host_resident_memory() - before
    assert 80 * 2**20 < grown < 200 * 2**20, (grown, block[0], os.getpid())
