"""The loop: counts, stops, resumes, and what it costs."""

import contextlib
import json
import logging
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.training.toy import Numbers, Regression, Toy, arrays, assert_same, build
from vidar.checkpoint import load_item
from vidar.errors import CheckpointError, ConfigError, DataError, DivergenceError
from vidar.sharding import MeshConfig
from vidar.training import TrainingConfig, loop, train
from vidar.training.distributed import only_process

NOISY = Toy(
    objective=Regression(noise=0.3, ema_start=4),
    training=TrainingConfig(steps=12, log_every=5, save_every=3, tensorboard=False),
)


def rows(workdir, measured=False):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if measured or not key.startswith("time/")} for row in lines]


def stopping_at(position, number=signal.SIGTERM):
    """Batches whose reading at a position sends a signal to this process, once."""
    sent = []

    def on_read(read):
        if read == position and not sent:
            sent.append(read)
            os.kill(os.getpid(), number)

    return lambda: Numbers(on_read=on_read)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return train(NOISY.run(), workdir), workdir


def test_update_counts_of_a_five_to_one_schedule(tmp_path):
    """Self Forcing's counts at step 600: critic 600, generator 120, average 80 from step 200 on."""
    toy = Toy(training=TrainingConfig(steps=600, log_every=100, save_every=600))
    state = train(toy.run(), tmp_path)
    assert int(state.step) == 600
    assert {name: int(count) for name, count in state.updates.items()} == {"critic": 600, "generator": 120}
    assert {name: int(count) for name, count in state.ema_updates.items()} == {"generator": 80}
    assert int(state.optimizer["critic"]["count"]) == 600
    assert int(state.optimizer["generator"]["count"]) == 120
    last = rows(tmp_path)[-1]
    assert (last["updates/critic"], last["updates/generator"], last["ema_updates/generator"]) == (600, 120, 80)
    assert last["critic/loss"] < 0.3 * rows(tmp_path)[0]["critic/loss"]
    assert load_item(tmp_path / "checkpoints", "meta", None)["name"] == "toy"


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, ["step 5 of 12", "step 10 of 12"]), (60.0, ["step 5 of 12"])])
def test_log_files_get_a_line_now_and_then(tmp_path, monkeypatch, caplog, seconds, lines):
    monkeypatch.setattr("vidar.training.report._LINE_EVERY", seconds)
    with caplog.at_level(logging.INFO, "vidar"):
        train(NOISY.run(), tmp_path)
    said = [message for message in caplog.messages if message.startswith("step ")]
    assert [message.partition(",")[0] for message in said] == lines
    assert all("critic/loss" in message and message.endswith(" steps/s") for message in said)


def test_rows_hold_the_means_of_their_steps(tmp_path, uninterrupted):
    """A row of five steps is the mean of the five rows of one step each, over the updates that each phase had."""
    every = replace(NOISY, training=replace(NOISY.training, log_every=1))
    state = train(every.run(), tmp_path)
    assert_same(state.networks, uninterrupted[0].networks)
    single, grouped = rows(tmp_path), rows(uninterrupted[1])
    assert [row["step"] for row in grouped] == [5, 10]
    assert [row["step"] for row in single] == list(range(1, 13))
    for first, row in zip((0, 5), grouped, strict=True):
        part = single[first : first + 5]
        for name in ("critic/loss", "critic/update_norm", "generator/loss", "critic/even"):
            values = [entry[name] for entry in part if name in entry]
            assert len(values) == (1 if name.startswith("generator") else 5)
            assert row[name] == pytest.approx(np.mean(values), rel=1e-5)


def test_a_run_stopped_by_sigterm_and_resumed_equals_the_uninterrupted_one(tmp_path, uninterrupted, caplog):
    expected, workdir = uninterrupted
    with caplog.at_level(logging.WARNING, "vidar"):
        stopped = train(NOISY.run(batches={"main": stopping_at(6)}), tmp_path)
    assert 3 <= int(stopped.step) <= 8
    assert f"SIGTERM: stopped after step {int(stopped.step)}, which is saved" in caplog.messages
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    resumed = train(NOISY.run(), tmp_path)
    assert_same(resumed, expected)
    assert rows(tmp_path) == rows(workdir)
    assert_same(train(NOISY.run(), tmp_path), expected)  # nothing is left to do


def test_ctrl_c_saves_and_then_interrupts(tmp_path, uninterrupted, caplog):
    before = signal.getsignal(signal.SIGINT)  # in a shell's background, it is ignored
    with caplog.at_level(logging.WARNING, "vidar"), pytest.raises(KeyboardInterrupt):
        train(NOISY.run(batches={"main": stopping_at(6, signal.SIGINT)}), tmp_path)
    assert any("which is saved" in message for message in caplog.messages)
    assert signal.getsignal(signal.SIGINT) == before
    assert_same(train(NOISY.run(), tmp_path), uninterrupted[0])


def test_one_process_at_a_time(tmp_path):
    with only_process(tmp_path), pytest.raises(ConfigError, match="another process trains here"):
        train(NOISY.run(), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be the directory of a run"):
        train(NOISY.run(), tmp_path / "file")


def test_another_run_does_not_go_on_in_its_place(tmp_path):
    run = replace(NOISY.run(), identity=lambda meta: meta["config"])
    config = {"objective": {"kind": "toy", "noise": 0.3}, "sizes": (1, 2)}
    first = replace(run, meta={"config": config}, training=replace(run.training, steps=3))
    train(first, tmp_path)
    with pytest.raises(ConfigError, match=r"a run with objective\.noise=0\.3, now 0\.1"):
        train(replace(run, meta={"config": {**config, "objective": {"kind": "toy", "noise": 0.1}}}), tmp_path)
    assert int(train(replace(run, meta={"config": config, "place": "elsewhere"}), tmp_path).step) == 12


def test_what_changed_since_the_last_start_is_said(tmp_path, caplog):
    run = NOISY.run()
    train(replace(run, meta={"run": {"batch": 4}}, training=replace(run.training, steps=3)), tmp_path)
    with caplog.at_level(logging.INFO, "vidar"):
        train(replace(run, meta={"run": {"batch": 8}}), tmp_path)
    assert [text for text in caplog.messages if text.startswith("changed: ")] == ["changed: batch=8, was 4"]


def test_resuming_in_the_middle_of_a_row(tmp_path):
    """The generator's only update of the row lies before the restart."""
    toy = Toy(objective=replace(NOISY.objective, every=50), training=replace(NOISY.training, log_every=9, steps=9))
    train(toy.run(), tmp_path / "whole")
    train(toy.run(batches={"main": stopping_at(6)}), tmp_path / "parts")
    train(toy.run(), tmp_path / "parts")
    assert "generator/loss" in rows(tmp_path / "whole")[0]
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over(tmp_path, uninterrupted, caplog):
    expected, workdir = uninterrupted
    train(NOISY.run(training=replace(NOISY.training, steps=9)), tmp_path)
    data = max((tmp_path / "checkpoints" / "00000009").glob("**/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    with caplog.at_level(logging.WARNING, "vidar"):
        resumed = train(NOISY.run(), tmp_path)
    assert [message for message in caplog.messages if "00000009 is damaged" in message]
    assert_same(resumed, expected)
    assert rows(tmp_path) == rows(workdir)


def test_too_many_non_finite_steps_end_the_run(tmp_path):
    few = TrainingConfig(steps=20, log_every=2, save_every=2, max_nonfinite=3, tensorboard=False)
    pairs = Toy(objective=Regression(every=0, poison=(2, 3, 5, 6)), training=few)
    assert int(train(pairs.run(), tmp_path / "pairs").skipped) == 4
    assert [row["skipped"] for row in rows(tmp_path / "pairs")][:4] == [0, 2, 3, 4]
    assert "critic/loss" not in rows(tmp_path / "pairs")[1]
    triple = replace(pairs, objective=replace(pairs.objective, poison=(2, 3, 4)))
    with pytest.raises(DivergenceError, match=r"step 6: 3 updates in a row .*max_nonfinite=3"):
        train(triple.run(), tmp_path / "triple")


def test_a_network_that_never_learns_ends_the_run_whatever_the_others_do(tmp_path):
    few = TrainingConfig(steps=20, log_every=2, save_every=20, max_nonfinite=3, tensorboard=False)
    toy = Toy(objective=Regression(every=1, poison=tuple(range(4, 20)), poisoned=("generator",)), training=few)
    with pytest.raises(DivergenceError, match=r"step 8: 4 updates in a row"):
        train(toy.run(), tmp_path / "run")


def test_callbacks_get_the_averaged_networks_and_write_rows(tmp_path):
    calls = []

    def evaluate(step, networks, writer):
        calls.append((step, arrays(networks["generator"]), sorted(networks), writer.directory))
        return {"eval/position": 0.5}

    training = TrainingConfig(steps=5, log_every=100, save_every=100, eval_every=2, tensorboard=False)
    toy = Toy(objective=Regression(every=1, ema_start=0), training=training)
    state = train(toy.run(evaluate=evaluate), tmp_path)
    assert [call[0] for call in calls] == [2, 4, 5]
    assert calls[0][2:] == (["critic", "generator", "teacher"], tmp_path)
    for path, leaf in arrays(state.ema["generator"]).items():
        np.testing.assert_array_equal(calls[-1][1][path], leaf)
    assert not np.array_equal(calls[-1][1][".enter.value"], arrays(state.networks["generator"])[".enter.value"])
    assert rows(tmp_path) == [{"step": step, "eval/position": 0.5} for step in (2, 4, 5)]


@pytest.mark.timing
def test_host_time_and_compilations(tmp_path, monkeypatch):
    """Everything outside the device step costs at most 3 ms, and each phase is compiled once."""
    compiled = []
    original = loop._Loop._compile

    def counted(self, phase, inputs):
        before = len(self._compiled)
        executable = original(self, phase, inputs)
        compiled.extend([phase.name] * (len(self._compiled) - before))
        return executable

    monkeypatch.setattr(loop._Loop, "_compile", counted)
    toy = Toy(training=TrainingConfig(steps=400, log_every=50, save_every=400))
    train(toy.run(), tmp_path)
    assert sorted(compiled) == ["critic", "generator"]
    host = [row["time/host_ms"] for row in rows(tmp_path, measured=True)]
    assert np.median(host) <= 3.0, host


def test_mistakes_are_one_line(tmp_path):
    toy = Toy(training=TrainingConfig(steps=2, tensorboard=False))
    with pytest.raises(ConfigError, match=r"roles \['critic', 'generator'\] must be built, not \['critic'\]"):
        train(toy.run(build={"critic": build}), tmp_path)
    with pytest.raises(ConfigError, match=r"wants optimizer 'critic'; configured: \['generator'\]"):
        train(toy.run(optimizers={"generator": toy.optimizer}), tmp_path)
    with pytest.raises(ConfigError, match="data=2"):
        train(toy.run(mesh=MeshConfig(data=2)), tmp_path)
    with pytest.raises(ConfigError, match=r"save_every=0 must be at least 1"):
        TrainingConfig(steps=1, save_every=0)

    class Short(Numbers):
        def __next__(self):
            if self.position == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(DataError, match="the batches 'main' ended"):
        train(toy.run(batches={"main": Short}, training=replace(toy.training, steps=9)), tmp_path / "short")


def test_another_teacher_is_refused_on_resume(tmp_path):
    toy = Toy(training=TrainingConfig(steps=1, tensorboard=False))
    train(toy.run(), tmp_path)
    with pytest.raises(CheckpointError, match="frozen role 'teacher' is not the network that step 1 was trained with"):
        train(toy.run(frozen={"teacher": build(jax.random.key(78))}), tmp_path)


def test_a_time_limit_saves_and_the_rest_follows(tmp_path, uninterrupted, caplog):
    with caplog.at_level(logging.WARNING, "vidar"):
        stopped = train(NOISY.run(training=replace(NOISY.training, max_seconds=0.0)), tmp_path)
    assert int(stopped.step) == 1
    assert "time limit: stopped after step 1, which is saved" in caplog.messages
    assert_same(train(NOISY.run(), tmp_path), uninterrupted[0])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_disk_that_fills_up_costs_one_line_and_nothing_else(small_disk, uninterrupted, tensorboard):
    if small_disk is None:
        pytest.skip("only root may mount a small disk; tests/test_checkpoint.py simulates a full one")
    training = replace(NOISY.training, tensorboard=tensorboard, log_every=5)
    filler = small_disk / "filler"

    def on_read(position):
        if position == 6:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    full = NOISY.run(training=training, batches={"main": lambda: Numbers(on_read=on_read)})
    with pytest.raises(CheckpointError, match=r"disk is full|No space left on device") as caught:
        train(full, small_disk / "run")
    assert "\n" not in str(caught.value)
    filler.unlink()
    assert_same(train(NOISY.run(training=training), small_disk / "run"), uninterrupted[0])
    assert rows(small_disk / "run") == rows(uninterrupted[1])
