"""Benchmark records: what they derive, how they print, and that a file of results is never lost."""

from dataclasses import replace

import pytest

from vidar import ConfigError, DataError
from vidar.benchmark.report import Percentiles, Record, merge, percentiles, read, table

STREAM = Record(
    bench="stream",
    device="NVIDIA H200",
    preset="wan_1_3b",
    resolution=(480, 832),
    batch=1,
    window=12,
    steps="4+1",
    precision="bfloat16",
    backend="cudnn",
    decoder=False,
    warmup=10,
    time=Percentiles(300.0, 310.0, 330.0, 100),
    frames=12,
    flops=141.5e12,
    roofline=142.9,
    first_frame=350.0,
    software="jax 0.10.2",
)


def test_percentiles_are_in_milliseconds():
    found = percentiles([0.001 * tick for tick in range(1, 102)])
    assert (found.p50, found.p90, found.p99, found.count) == (
        pytest.approx(51),
        pytest.approx(91),
        pytest.approx(100),
        101,
    )
    with pytest.raises(ConfigError, match="no times"):
        percentiles([])


def test_rates_follow_from_the_median():
    assert STREAM.frames_per_second == pytest.approx(40)
    assert STREAM.percent_of_roofline == pytest.approx(47.63, abs=0.01)
    lowered = replace(STREAM, time=None)
    assert lowered.frames_per_second is None
    assert lowered.percent_of_roofline is None
    assert replace(STREAM, roofline=None).percent_of_roofline is None


def test_table_says_every_condition_in_aligned_columns():
    lines = table([STREAM, replace(STREAM, preset="tiny", time=None, decoder=True, first_frame=None)]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    first, second = (dict(zip(cells[0], row, strict=True)) for row in cells[2:])
    assert first == {
        "bench": "stream",
        "device": "NVIDIA H200",
        "preset": "wan_1_3b",
        "pixels": "480×832",
        "batch": "1",
        "window": "12",
        "steps": "4+1",
        "precision": "bfloat16",
        "backend": "cudnn",
        "decoder": "out",
        "warm-up": "10",
        "p50 ms": "300.0",
        "p90 ms": "310.0",
        "p99 ms": "330.0",
        "first frame ms": "350.0",
        "frames/s": "40.0",
        "TFLOP": "141.5",
        "% of roofline": "47.6",
    }
    assert (second["p50 ms"], second["frames/s"], second["decoder"]) == ("–", "–", "in")


def test_merging_replaces_what_was_measured_again_and_keeps_the_rest(tmp_path):
    other = replace(STREAM, window=21)
    assert merge([STREAM, other], tmp_path) == (tmp_path / "nvidia-h200.json",)
    faster = replace(STREAM, time=Percentiles(200.0, 201.0, 202.0, 50), software="jax 0.11")
    lowered = replace(STREAM, time=None)
    cpu = replace(STREAM, device="cpu x1")
    assert merge([faster, lowered, cpu], tmp_path) == (tmp_path / "nvidia-h200.json", tmp_path / "cpu-x1.json")
    assert set(read(tmp_path / "nvidia-h200.json")) == {faster, lowered, other}
    assert read(tmp_path / "cpu-x1.json") == (cpu,)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_order_of_a_file_does_not_depend_on_the_order_of_measurement(tmp_path):
    records = [STREAM, replace(STREAM, window=21), replace(STREAM, bench="train")]
    (first,) = merge(records, tmp_path / "a")
    merge(records[2:], tmp_path / "b")
    (second,) = merge(records[:2], tmp_path / "b")
    assert first.read_text() == second.read_text()


@pytest.mark.parametrize("content", ['[{"bench": "stream"', '[{"bench": "stream"}]', '{"a": 1}', "3"])
def test_damaged_results_are_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "nvidia-h200.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"nvidia-h200\.json: not a file of benchmark results") as refusal:
        merge([STREAM], tmp_path)
    assert "\n" not in str(refusal.value)
    assert path.read_text() == content
    with pytest.raises(DataError, match=r"missing\.json"):
        read(tmp_path / "missing.json")
