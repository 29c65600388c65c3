"""What holds for every test: CPU, strict promotion, checked shapes; and subprocesses for more devices than one."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what tests do, here and in their subprocesses: so with less effort, and the same thing once.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # in the first process; workers and subprocesses inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vidar-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import fcntl
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes are checked where the numbers are; the hook must be installed before these modules are first imported.
install_import_hook(["vidar.diffusion", "vidar.attention", "vidar.sampling"], "beartype.beartype")

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Lets tests that measure time run alone, where several workers share the machine."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    wanted = fcntl.LOCK_EX if item.get_closest_marker("timing") else fcntl.LOCK_SH
    with open(__file__) as gate, open(ROOT / "pyproject.toml") as floor:  # any two files that all workers see
        # Who waits for the floor keeps the gate shut, so that nobody else slips in before.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(floor, wanted)
        fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)


def subprocess_environment(devices: int) -> dict[str, str]:
    """Environment of a Python process with the strictness of this file and several virtual CPU devices."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def run_python():
    """Runs Python code in a process of its own with virtual CPU devices; fails the test with its output.

    Use it as `run_python(code, devices=8)`; it returns what the code printed. Code may `import tests.…`.
    """

    def run(code: str, devices: int = 8, timeout: float = 300) -> str:
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=subprocess_environment(devices),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if result.returncode:
            pytest.fail(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}", pytrace=False)
        return result.stdout

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, or None where this process may not mount one."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    yield path if mounted else None
    if mounted:
        # Lazily: the traceback of a failed test may still hold a file open.
        subprocess.run(["umount", "-l", str(path)], check=True)
