"""Rows on disk."""

import json

import numpy as np
import pytest

from vidar.errors import CheckpointError
from vidar.training.logging import MetricWriter, window_means


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_means_and_ratios():
    names = ("bucket/0:count", "bucket/0:sum", "bucket/1:count", "bucket/1:sum", "lonely:sum", "loss")
    means = window_means(names, np.array([4.0, 6.0, 0.0, 0.0, 3.0, 10.0], np.float32), 2)
    assert means == {"bucket/0": 1.5, "lonely:sum": 1.5, "loss": 5.0}
    assert window_means(names, np.zeros(6), 0) == {}


def test_a_resumed_file_drops_later_and_torn_rows(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    for step in (5, 10, 15):
        writer.scalars(step, {"loss": step / 2, "bad": float("nan"), "count": 3})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": \xff}\n{"step": 20, "lo')
    again = MetricWriter(tmp_path, after=10, tensorboard=False)
    again.scalars(15, {"loss": 1.0})
    again.close()
    assert rows(tmp_path) == [
        {"step": 5, "loss": 2.5, "bad": None, "count": 3},
        {"step": 10, "loss": 5.0, "bad": None, "count": 3},
        {"step": 15, "loss": 1.0},
    ]


def test_a_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file, not a directory"):
        MetricWriter(tmp_path / "file" / "run", tensorboard=False)


def test_tensorboard_holds_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    writer = MetricWriter(tmp_path)
    writer.scalars(7, {"main/loss": 0.25})
    writer.image(7, "sheet", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    (path,) = (tmp_path / "tensorboard").glob("events.*")
    data, position, found = path.read_bytes(), 0, {}
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        event = Event.FromString(data[position + 12 : position + 12 + length])
        position += 12 + length + 4
        for value in event.summary.value:
            found[value.tag] = (event.step, value.simple_value, value.image.width)
    assert found == {"main/loss": (7, 0.25, 0), "sheet": (7, 0.0, 6)}
