"""Teacher forcing on recorded ViZDoom gameplay with actions.

Paper: the teacher-forcing baseline of Self Forcing (arXiv 2506.08009, section 3), as an action-conditioned world model.
Data: `vidar data doom --output data/doom` (60,000 frames of 32×32)
Command: `vidar train --config configs/doom/teacher_forcing.py --workdir runs/doom_teacher_forcing`
Hardware: 2 CPU cores, about an hour and a half; 64 tokens a frame, 6 frames a clip. Resumable at any time.
Metric: `vidar eval turning --model runs/doom_teacher_forcing --records data/doom --output runs/turning`
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {"kind": "teacher_forcing", "context_noise": 0.2, "ema": 0.995}
    config.visibility = {"kind": "teacher_forcing"}
    config.video = {"height": 32, "width": 32, "frames": 6, "chunk": 1}
    config.codec = {"kind": "pixel", "patch": 4, "mean": -0.7, "deviation": 0.2}
    config.model = {
        "width": 128,
        "layers": 4,
        "heads": 2,
        "mlp": 256,
        "channels": 48,
        "actions": {"kind": "discrete", "count": 4},
        "precision": {"compute": "float32"},
        "remat": True,
    }
    config.solver = {"kind": "euler", "steps": 8}
    config.context = {"window": 6}
    config.data = {"records": "data/doom", "frames": 6, "batch": 12}
    config.optimizers = {
        "student": {
            "name": "muon",
            "learning_rate": 0.02,
            "schedule": "cosine",
            "warmup": 20,
            "decay_steps": 1000,
            "final_fraction": 0.05,
            "beta1": 0.95,
            "beta2": 0.98,
        }
    }
    config.training = {"steps": 1000, "log_every": 20, "save_every": 100, "eval_every": 500, "sample_every": 250}
    return config
