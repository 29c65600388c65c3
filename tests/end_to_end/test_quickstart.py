"""What ships with the package fits the cards that go on from it, and the quickstart refuses nonsense at once."""

import json

import pytest

from vidar.cli.main import main
from vidar.cli.quickstart import shipped
from vidar.system import load
from vidar.training.experiment import load_run_config, portable_dict, system_dict
from vidar.weights import read_meta

ROLES = [
    ("world", "student", "world/teacher_forcing"),
    ("world", "student", "systems/self_forcing_dmd"),
    ("world", "teacher", "world/teacher"),
    ("captions", "student", "captions/less_guided"),
    ("captions", "student", "systems/self_forcing_dmd.py:captions"),
    ("captions", "student", "systems/causvid.py:captions"),
    ("captions", "teacher", "captions/teacher"),
]
FILES = [shipped().with_name(f"{name}.safetensors") for name in ("world", "captions")]


@pytest.mark.parametrize(("name", "role", "card"), ROLES)
def test_shipped_weights_fit_the_cards(name, role, card):
    system, _ = load(shipped().with_name(f"{name}.safetensors"), role)
    card = card if ".py:" in card else f"{card}.py"
    config = load_run_config(f"configs/{card}")
    assert system.config.model == config.model
    assert system.config.codec == config.codec
    assert (system.config.video.height, system.config.video.width) == (config.video.height, config.video.width)
    if role == "student":
        assert system.config.context == config.context


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_weights_are_small(file):
    assert file.stat().st_size <= 4.5e6


@pytest.mark.parametrize("minutes", ["nan", "0", "-1", "61"])
def test_nonsense_is_refused_before_anything_is_made(minutes, tmp_path, capsys):
    assert main(["quickstart", "--output", str(tmp_path / "tour"), "--minutes", minutes]) == 2
    assert "--minutes=" in capsys.readouterr().err
    assert not (tmp_path / "tour").exists()


def test_weights_that_travel_name_no_places():
    config = load_run_config("configs/systems/self_forcing_dmd.py")
    assert "runs/world_teacher" in json.dumps(system_dict(config))
    assert "runs/" not in json.dumps(portable_dict(config))
    for file in FILES:
        systems = read_meta(file)["systems"]
        assert set(systems) == {"student", "teacher"}
        assert not {"start", "student", "teacher"} & set().union(*(one["objective"] for one in systems.values()))
