"""Diffusion forcing on the one-shape world: every chunk at a level of its own, context as noisy as it comes.

Paper: Diffusion Forcing (arXiv 2407.01392), with chunk-causal attention.
Data: `vidar data world --directory data/world --frames 8`
Command: `vidar train --config configs/world/diffusion_forcing.py --workdir runs/world_diffusion_forcing`
Hardware: 2 CPU cores; 16 tokens a frame, 8 frames a clip.
Metric: as for teacher_forcing.py (`vidar eval world`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {"kind": "diffusion", "ema": 0.99}
    config.visibility = {"kind": "chunk_causal"}
    config.levels = {"base": {"kind": "independent"}}
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
    config.solver = {"kind": "euler", "steps": 8}
    config.context = {"window": 4, "sink": 1, "positions": "relative"}
    config.data = {"tfds": "vidar_world/one_shape", "directory": "data/world", "frames": 8, "batch": 24}
    config.optimizers = {
        "student": {
            "name": "muon",
            "learning_rate": 0.02,
            "schedule": "cosine",
            "warmup": 20,
            "decay_steps": 1400,
            "final_fraction": 0.02,
            "beta1": 0.95,
            "beta2": 0.98,
        }
    }
    config.training = {"steps": 1400, "log_every": 20, "save_every": 200, "eval_every": 350, "sample_every": 350}
    return config
