"""Resampling forcing on longer clips of the one-shape world, from the student of teacher_forcing.py.

Paper: Resampling Forcing (arXiv 2512.15702): the history carries the student's own errors, and no teacher is needed.
Data: `vidar data world --directory data/world16 --frames 16`
Command: `vidar train --config configs/world/long.py --workdir runs/world_long`
Hardware: 2 CPU cores; 16 tokens a frame, 16 frames a clip: the shape walks far from where the first frame shows it.
Metric: position error of the generated shape against the simulated truth, from one given frame (`vidar quickstart`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {
        "kind": "teacher_forcing",
        "start": "runs/world_student",
        "resample": True,
        "context_noise": 0.5,
        "ema": 0.99,
    }
    config.visibility = {"kind": "teacher_forcing"}
    config.video = {"height": 16, "width": 16, "frames": 16, "chunk": 1}
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
    # The first frame stays in view, clean, and says what the shape is; the others say where it is.
    config.context = {"window": 4, "sink": 1, "positions": "relative"}
    # What it generated is noised a little before it becomes context, so that small errors do not add up.
    config.plan = {"commit": {"kind": "extra_pass", "level": 0.15, "noise": True}}
    config.data = {"tfds": "vidar_world/one_shape", "directory": "data/world16", "frames": 16, "batch": 12}
    config.optimizers = {
        "student": {
            "name": "muon",
            "learning_rate": 0.015,
            "schedule": "cosine",
            "warmup": 20,
            "decay_steps": 1200,
            "final_fraction": 0.02,
            "beta1": 0.95,
            "beta2": 0.98,
        }
    }
    config.training = {"steps": 1200, "log_every": 20, "save_every": 200, "eval_every": 600, "sample_every": 600}
    return config
