"""`vidar bench`, as a person would call it."""

import json

import pytest

from vidar.benchmark.report import read
from vidar.cli.main import main


def test_measuring_prints_a_table_and_json_and_merges_the_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    arguments = ["bench", "stream", "--preset", "tiny", "--ticks", "3", "--warmup", "2", "--window", "2", "--decoder"]
    assert main([*arguments, "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header, row = ([cell.strip() for cell in lines[index].split("|")[1:-1]] for index in (0, 2))
    shown = dict(zip(header, row, strict=True))
    assert (shown["preset"], shown["window"], shown["decoder"], shown["warm-up"]) == ("tiny", "2", "in", "2")
    (stored,) = read(tmp_path / "cpu.json")
    assert json.loads(lines[3])["time"]["p50"] == stored.time.p50
    assert float(shown["p50 ms"]) == pytest.approx(stored.time.p50, abs=0.051)


def test_lower_only_says_flops_bytes_and_rooflines(capsys):
    assert main(["bench", "stream", "--preset", "wan_1_3b", "--window", "12", "--lower-only"]) == 0
    out = capsys.readouterr().out
    assert "141.5 TFLOP a tick" in out
    assert "87.5 GB" in out
    assert "H200          142.9 ms" in out
    assert "% to the counted" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("stream --preset huge", "preset 'huge' is unknown: use one of tiny"),
        ("stream --mesh heads=2", "'heads=2' is not an axis and a size"),
        ("stream --mesh data=3", "needs 3 devices, there are 1"),
        ("stream --height 16", "--height and --width go together"),
        ("stream --topology v5e:2x4", "add --lower-only"),
        ("stream --lower-only --results x", "name a --topology"),
        ("train --ticks 0", "both must be at least 1"),
        ("train --decoder", "a training step decodes nothing"),
        ("stream --height 0 --width 0", "height=0 must be at least 1"),
        ("stream --height 16 --width -8", "width=-8 must be at least 1"),
        ("stream --window 0", "window=0 must be at least 1"),
        ("stream --mesh data=²", "'data=²' is not an axis and a size"),
        ("stream --mesh data=--2", "'data=--2' is not an axis and a size"),
        ("stream --results pyproject.toml", "pyproject.toml is a file, not a directory"),
        ("stream --backend splash --ticks 2", "needs a TPU, these devices are cpu: use backend='xla'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(["bench", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
