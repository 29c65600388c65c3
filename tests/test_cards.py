"""Every experiment card composes, and says of itself what a person needs."""

import copy
import json
from pathlib import Path

import pytest

from vidar.ablation.card import load_ablation
from vidar.config import differences
from vidar.errors import ConfigError
from vidar.training.experiment import abstract_run, checks, load_run_config

CONFIGS = Path("configs")
SYSTEMS = sorted(path for path in (CONFIGS / "systems").glob("*.py"))
PLAIN = sorted(path for path in CONFIGS.glob("*/*.py") if path.parent.name not in ("systems", "ablations"))
BASES = ("world", "doom", "captions", "wan_1_3b")
CARDS = [str(path) for path in PLAIN] + [f"{path}:{base}" for path in SYSTEMS for base in BASES]
CARDS.append("configs/captions/less_guided.py:causvid")


@pytest.mark.parametrize("card", CARDS)
def test_a_card_composes(card, monkeypatch):
    monkeypatch.setattr(checks, "check_backend", lambda backend: None)  # some are for other devices
    config = load_run_config(card)
    run = abstract_run(config)
    if config.data.trajectories is None:  # which must be there to be checked
        checks.check_run(config)
    assert {role.optimizer for role in run.objective.roles.values()} - {None} == set(run.optimizers)


@pytest.mark.parametrize("path", [*PLAIN, *SYSTEMS], ids=str)
def test_a_card_says_what_it_needs(path):
    text = path.read_text()
    for word in ("Paper", "Command: ", "Hardware: ", "Metric: "):
        assert word in text


@pytest.mark.parametrize("path", sorted((CONFIGS / "ablations").glob("*.py")), ids=str)
def test_an_ablation_is_one(path):
    assert load_ablation(path).name == path.stem


def test_a_run_goes_on_where_a_new_option_has_its_default():
    run = abstract_run(load_run_config("configs/systems/causvid.py:world"))
    saved = json.loads(json.dumps(dict(run.meta)))
    assert not list(differences(run.identity(saved), run.identity(run.meta)))
    older = copy.deepcopy(saved)
    del older["config"]["objective"]["forcing"]["simulated"], older["config"]["teacher"]
    older["config"]["model"]["remat"] = not older["config"]["model"]["remat"]  # not of the run, but of the machine
    assert not list(differences(run.identity(older), run.identity(run.meta)))
    older["config"]["objective"]["forcing"]["simulated"] = True
    changes = list(differences(run.identity(older), run.identity(run.meta)))
    assert changes == [("objective.forcing.simulated", True, False)]
    older["config"]["option"] = 1
    with pytest.raises(ConfigError, match=r"cannot go on with this version: config\.option: unknown key"):
        run.identity(older)


def test_the_published_settings_of_self_forcing():
    config = load_run_config("configs/systems/self_forcing_dmd.py:wan_1_3b")
    objective, optimizers = config.objective, config.optimizers
    assert (optimizers["student"].learning_rate, optimizers["critic"].learning_rate) == (2e-6, 4e-7)
    assert (optimizers["student"].beta1, optimizers["student"].clip, config.data.batch) == (0.0, 10.0, 64)
    assert (objective.generator_every, objective.ema, objective.ema_start, config.training.steps) == (5, 0.99, 200, 600)
    assert [branch.coefficient for branch in objective.matching.guidance] == [4.0, -3.0]
    assert (config.teacher.width, config.critic.width, config.model.width) == (5120, 1536, 1536)
    assert (config.video.frames, config.video.chunk) == (21, 3)
