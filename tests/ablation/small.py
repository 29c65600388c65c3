"""A grid of two tiny cells with a stage before them, as a card on disk and as commands."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, subprocess_environment
from vidar.ablation.card import AblationConfig, load_ablation
from vidar.ablation.grid import Grid, expand
from vidar.config import build

CARD = """
from ml_collections import ConfigDict
from tests.ablation.small import values

def get_config():
    return ConfigDict(values())
"""


def values() -> dict[str, Any]:
    """The card's values."""
    optimizer = {"name": "adamw", "learning_rate": 1e-2, "warmup": 1, "schedule": "constant"}
    start = {"overrides": {"objective": {"start": "stage:start"}}}
    diffusion = start | {"card": "configs/world/diffusion_forcing.py"}
    diffusion["overrides"] = diffusion["overrides"] | {"solver": {"kind": "euler", "steps": 1}}
    return {
        "name": "small",
        "world": {"clips": 16, "validation_clips": 4, "frames": 4},
        "base": {
            "card": "configs/world/teacher_forcing.py",
            "overrides": {
                "video": {"frames": 4},
                "model": {"width": 16, "layers": 1, "heads": 2, "mlp": 16, "remat": False},
                "solver": {"kind": "few_step", "times": (1000.0,), "shift": 5.0},
                "optimizers": {"student": optimizer},
                "data": {"frames": 4, "batch": 2, "cache_megabytes": 8},
                "training": {"steps": 3, "log_every": 5, "save_every": 10},
            },
        },
        "stages": {"start": {}},
        "factors": {"forcing": {"teacher": start, "diffusion": diffusion}},
        "seeds": (3, 5),
        "budget": {"unit": "updates", "amount": 60},
        "evaluation": {"kind": "world", "clips": 3, "frames": 12, "spans": {"early": (1, 4), "late": (8, 12)}},
        "contrast": {"metric": "psnr", "span": "late", "better": ("teacher",), "worse": ("diffusion",)},
        "control": {"corrupt": "given", "amounts": (0.5, 1.0), "cells": ("teacher",)},
    }


def grid(**changes: Any) -> Grid:
    """The grid, with some of the card's values changed."""
    return expand(build(AblationConfig, values() | changes, "ablation"), ROOT / "configs" / "ablations" / "smoke.py")


def written(directory: Path) -> Path:
    """The card as a file."""
    card = directory / "small.py"
    card.write_text(CARD)
    return card


def loaded(card: Path) -> Grid:
    """The grid of a card on disk."""
    return expand(load_ablation(card), card)


def start(card: Path, output: Path, *options: str) -> subprocess.Popen:
    """Starts `vidar ablate`."""
    return subprocess.Popen(
        [sys.executable, "-m", "vidar.cli.main", "ablate", str(card), "--output", str(output), *options],
        env=subprocess_environment(1),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen) -> str:
    """Everything that a successful command said."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out + error
