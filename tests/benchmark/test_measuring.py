"""Measuring: the clock, and small networks measured for real."""

import math
import subprocess
import sys
import time

import jax
import pytest

from tests.conftest import subprocess_environment
from vidar.benchmark import stream, train
from vidar.benchmark.clock import intervals
from vidar.benchmark.workload import Workload
from vidar.errors import ConfigError
from vidar.sharding import MeshConfig, make_mesh


def test_intervals_are_between_completions_of_the_steady_state():
    events = []

    def dispatch():
        events.append("dispatch")
        return len([event for event in events if event == "dispatch"])

    def finish(unit):
        events.append(unit)
        time.sleep(0.03 if unit <= 2 else 0.01)

    times = intervals(dispatch, finish, count=5, warmup=2)
    assert len(times) == 5
    assert all(0.01 <= seconds < 0.025 for seconds in times)
    # One is always under way while another is waited for.
    assert events[:5] == ["dispatch", "dispatch", 1, "dispatch", 2]
    with pytest.raises(ConfigError, match="at least 1"):
        intervals(dispatch, finish, count=0, warmup=2)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_a_stream_is_measured_under_its_conditions(mesh):
    record = stream.measure(Workload("stream", "tiny", window=4, rows=2), mesh, ticks=6)
    assert (record.bench, record.preset, record.resolution, record.batch) == ("stream", "tiny", (16, 16), 2)
    assert (record.window, record.steps, record.backend, record.decoder) == (4, "4+1", "xla", False)
    assert (record.time.count, record.warmup, record.frames) == (6, 4, 2)
    assert 0 < record.time.p50 <= record.time.p90 <= record.time.p99 < 1e4
    assert record.frames_per_second == pytest.approx(2e3 / record.time.p50)
    assert record.first_frame > 0
    assert record.percent_of_roofline is None  # nobody publishes a CPU's peak


def test_a_training_step_is_measured_under_its_conditions(mesh):
    workload = Workload("train", "tiny", rows=2, layers=1, precision="float32", remat=True, frames=2)
    record = train.measure(workload, mesh, steps=3, warmup=1)
    assert (record.bench, record.steps, record.precision) == ("train", "teacher_forcing, remat", "float32")
    assert (record.time.count, record.frames, record.window) == (3, 4, 2)
    assert record.first_frame is None
    assert math.isfinite(record.time.p99)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rows=0), "rows=0"),
        (dict(name="wan_1_3b", window=13), "context.window=13 does not align"),
        (dict(name="wan_1_3b", pixels=(100, 100)), "do not divide into latents of 8×8"),
        (dict(name="wan_1_3b", pixels=(488, 832)), "do not divide into patches of 2×2"),
        (dict(name="small", decoder=True), "has no decoder"),
        (dict(name="wan_1_3b", frames=7), "not whole chunks of 3"),
        (dict(name="huge"), "preset 'huge' is unknown"),
        (dict(commit="fused", backend="cudnn"), "use backend=xla"),
    ],
)
def test_impossible_workloads_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Workload(**{"bench": "stream", **options})


def test_benchmarks_import_no_data_or_video_packages():
    code = (
        "import sys; import vidar.cli.bench, vidar.benchmark.stream, vidar.benchmark.train, vidar.benchmark.lowering;"
        "print([name for name in ('grain', 'tensorflow_datasets', 'av', 'ml_collections') if name in sys.modules])"
    )
    environment = subprocess_environment(1)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
