"""Causal consistency distillation: a few-step student from an autoregressive teacher, without trajectories.

Papers: consistency models (arXiv 2303.01469); the causal initialisation that Causal Forcing argues for.
Command: `vidar train --config configs/systems/consistency.py:BASE --workdir runs/BASE_consistency`
    BASE is world (the default), doom, captions or wan_1_3b, each after its teacher_forcing.py: teacher and start.
Hardware: as the base's teacher_forcing.py, with three passes in place of one.
Metric: as self_forcing_dmd.py, which may start from it (`--config.objective.student=runs/BASE_consistency`).
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load

CONFIGS = Path(__file__).parent.parent


def get_config(base: str = "world") -> ConfigDict:
    """The experiment."""
    base = base or "world"
    config = load(CONFIGS / base / "teacher_forcing.py").unlock()
    source = "runs/world_student" if base == "world" else f"runs/{base}_teacher_forcing"
    config.objective = {
        "kind": "consistency",
        "student": source,
        "teacher": source,
        "given": 1 if base in ("world", "doom") else 0,
        "ema": 0.99,
    }
    config.solver = {"kind": "few_step", "times": (1000.0, 750.0, 500.0, 250.0), "shift": 5.0}
    if base != "wan_1_3b":
        config.optimizers.student = {"name": "adamw", "learning_rate": 1e-4, "warmup": 10, "beta2": 0.99}
        config.training.update({"steps": 300, "eval_every": 300, "sample_every": 300})
    return config
