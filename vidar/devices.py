"""What a device can do and what it holds: published peaks, memory in use, memory of this process.

The peaks are the vendors' dense bf16 figures; they turn measured times into utilisations. This module must not know
what is being computed.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax


@dataclass(frozen=True)
class Peak:
    """The published limits of one device.

    Attributes:
        flops: Dense bf16 matrix throughput, FLOP/s.
        bandwidth: Memory bandwidth, bytes/s.
    """

    flops: float
    bandwidth: float


# Matched in order against the lower-case device kind that jax reports: longer names before those they contain.
_PEAKS = (
    ("h200", Peak(990e12, 4.8e12)),
    ("h100", Peak(990e12, 3.35e12)),
    ("b200", Peak(2250e12, 8e12)),
    ("a100", Peak(312e12, 2.04e12)),
    ("rtx 4090", Peak(165e12, 1.01e12)),
    ("tpu v5 lite", Peak(197e12, 0.82e12)),
    ("tpu v5e", Peak(197e12, 0.82e12)),
    ("tpu v5p", Peak(459e12, 2.77e12)),
    ("tpu v5", Peak(459e12, 2.77e12)),
    ("tpu v6 lite", Peak(918e12, 1.64e12)),
    ("tpu v6e", Peak(918e12, 1.64e12)),
)


def peak(device_kind: str) -> Peak | None:
    """Looks up the published peaks of a device.

    Args:
        device_kind: `jax.Device.device_kind`, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite".

    Returns:
        Its peaks, or None when the device is not in the table (a CPU, for one).
    """
    kind = device_kind.lower()
    return next((peak for name, peak in _PEAKS if name in kind), None)


def memory_in_use(device: Any) -> int | None:
    """Returns the bytes now allocated on a `jax.Device`, or None where the platform does not say."""
    return (device.memory_stats() or {}).get("bytes_in_use")


def memory_peak(device: Any) -> int | None:
    """Returns the most bytes ever allocated on a `jax.Device`, or None where the platform does not say."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def host_resident_memory() -> int:
    """Returns the resident memory of this process in bytes.

    Where `/proc` does not exist, the largest resident size so far stands in for the present one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def enable_compilation_cache(directory: str | None = None) -> None:
    """Keeps compiled executables on disk, so that the next start of the same program compiles nothing.

    Args:
        directory: Cache directory; None for `$JAX_COMPILATION_CACHE_DIR`, or `~/.cache/vidar/xla`.
    """
    chosen = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "vidar" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
