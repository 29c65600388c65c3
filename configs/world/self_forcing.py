"""Self forcing with DMD on the one-shape world, from a teacher-forced student and a bidirectional teacher.

Paper: Self Forcing (arXiv 2506.08009); here with a student update every second step.
Data: `vidar data world --directory data/world --frames 8`
Command: `vidar train --config configs/world/self_forcing.py --workdir runs/world_self_forcing`
    (after the cards teacher_forcing.py and teacher.py)
Hardware: 2 CPU cores.
Metric: identity, colour and position over 33 times the training length (`vidar quickstart`).
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher_forcing.py")).unlock()
    config.objective = {
        "kind": "self_forcing",
        "student": "runs/world_student",
        "teacher": "runs/world_teacher",
        "given": 1,
        "generator_every": 2,
        "shift": 3.0,
        "ema": 0.95,
        "ema_start": 10,
    }
    config.visibility = {"kind": "chunk_causal"}
    optimizer = {"name": "adamw", "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "warmup": 10}
    config.optimizers = {
        "student": optimizer | {"learning_rate": 1e-4},
        "critic": optimizer | {"learning_rate": 5e-4},
    }
    config.training.update({"steps": 300, "log_every": 10, "save_every": 100, "eval_every": 300, "sample_every": 300})
    return config
