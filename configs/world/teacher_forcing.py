"""Teacher forcing on the one-shape world: the student of the quickstart.

Paper: the teacher-forcing baseline of Self Forcing (arXiv 2506.08009, section 3), here with actions and a pixel codec.
Data: `vidar data world --directory data/world --frames 8`
Command: `vidar train --config configs/world/teacher_forcing.py --workdir runs/world_student`
Hardware: 2 CPU cores; 16 tokens a frame, 8 frames a clip.
Metric: position error of the generated shape against the simulated truth, from one given frame (`vidar quickstart`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {"kind": "teacher_forcing", "context_noise": 0.8, "ema": 0.99}
    config.visibility = {"kind": "teacher_forcing"}
    config.video = {"height": 16, "width": 16, "frames": 8, "chunk": 1}
    config.codec = {"kind": "pixel", "patch": 4, "mean": -0.75, "deviation": 0.35}
    config.model = {
        "width": 96,
        "layers": 6,
        "heads": 2,
        "mlp": 384,
        "channels": 48,
        "actions": {"kind": "discrete", "count": 5},
        "classes": 3,
        "precision": {"compute": "float32"},
        "remat": True,
    }
    config.solver = {"kind": "few_step", "times": (1000.0, 750.0, 500.0, 250.0), "shift": 5.0}
    # The first frame stays in view, clean, and says what the shape is; the others say where it is.
    config.context = {"window": 4, "sink": 1, "positions": "relative"}
    # What it generated is noised a little before it becomes context, so that small errors do not add up.
    config.plan = {"commit": {"kind": "extra_pass", "level": 0.15, "noise": True}}
    config.data = {"tfds": "vidar_world/one_shape", "directory": "data/world", "frames": 8, "batch": 24}
    config.optimizers = {
        "student": {
            "name": "muon",
            "learning_rate": 0.02,
            "schedule": "cosine",
            "warmup": 20,
            "decay_steps": 1600,
            "final_fraction": 0.02,
            "beta1": 0.95,
            "beta2": 0.98,
        }
    }
    config.training = {"steps": 1600, "log_every": 20, "save_every": 200, "eval_every": 400, "sample_every": 400}
    return config
