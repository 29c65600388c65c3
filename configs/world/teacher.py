"""Bidirectional diffusion on the one-shape world: the teacher of self forcing.

Paper: rectified flow (arXiv 2209.03003) over whole clips after a clean first frame, the others at one level.
Data: `vidar data world --directory data/world --frames 8`
Command: `vidar train --config configs/world/teacher.py --workdir runs/world_teacher`
Hardware: 2 CPU cores; 16 tokens a frame, 8 frames a clip.
Metric: loss per level; what it teaches is measured by `configs/world/self_forcing.py`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {"kind": "diffusion", "ema": 0.99}
    config.visibility = {"kind": "bidirectional"}
    # The first frame is given: clean, as self forcing will show it.
    config.levels = {"base": {"kind": "shared"}, "context": [{"kind": "clean_prefix", "probabilities": (0.0, 1.0)}]}
    config.plan = {"lag": 0}
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
    config.data = {"tfds": "vidar_world/one_shape", "directory": "data/world", "frames": 8, "batch": 24}
    config.optimizers = {
        "student": {
            "name": "muon",
            "learning_rate": 0.02,
            "schedule": "cosine",
            "warmup": 20,
            "decay_steps": 2000,
            "final_fraction": 0.02,
            "beta1": 0.95,
            "beta2": 0.98,
        }
    }
    config.training = {"steps": 2000, "log_every": 20, "save_every": 200}
    return config
