"""Self forcing with DMD on the one-shape world, from a teacher-forced student and a bidirectional teacher.

Paper: Self Forcing (arXiv 2506.08009); here with a student update every second step.
Data: `vidar data world --directory data/world --frames 8`
Command: `vidar train --config configs/world/self_forcing.py --workdir runs/world_self_forcing`
    (after the cards teacher_forcing.py, long.py and teacher.py)
Hardware: 2 CPU cores.
Metric: identity, colour and position over 16 times the training length (`vidar quickstart`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {
        "kind": "self_forcing",
        "student": "runs/world_long",
        "teacher": "runs/world_teacher",
        "given": 1,
        "generator_every": 2,
        "shift": 3.0,
        "ema": 0.95,
        "ema_start": 10,
    }
    config.video = {"height": 16, "width": 16, "frames": 8, "chunk": 1}
    config.codec = {"kind": "pixel", "patch": 4, "mean": -0.75, "deviation": 0.35}
    config.model = {
        "width": 96,
        "layers": 6,
        "heads": 2,
        "mlp": 384,
        "channels": 48,
        "actions": {"kind": "discrete", "count": 5},
        "precision": {"compute": "float32"},
        "remat": True,
    }
    config.solver = {"kind": "few_step", "times": (1000.0, 750.0, 500.0, 250.0), "shift": 5.0}
    config.context = {"window": 4, "sink": 1, "positions": "relative"}
    # What it generated is noised a little before it becomes context, so that small errors do not add up.
    config.plan = {"commit": {"kind": "extra_pass", "level": 0.15, "noise": True}}
    config.data = {"tfds": "vidar_world/one_shape", "directory": "data/world", "frames": 8, "batch": 24}
    optimizer = {"name": "adamw", "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "warmup": 10}
    config.optimizers = {
        "student": optimizer | {"learning_rate": 1e-4},
        "critic": optimizer | {"learning_rate": 5e-4},
    }
    config.training = {"steps": 300, "log_every": 10, "save_every": 100, "eval_every": 300, "sample_every": 300}
    return config
