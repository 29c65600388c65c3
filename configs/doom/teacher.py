"""Bidirectional diffusion on recorded ViZDoom gameplay, fine-tuned from teacher forcing: the teacher of self forcing.

Paper: rectified flow (arXiv 2209.03003) over whole clips after a clean first frame, the others at one level.
Data: `vidar data doom --output data/doom`
Command: `vidar train --config configs/doom/teacher.py --workdir runs/doom_teacher`
    (after teacher_forcing.py)
Hardware: 2 CPU cores, about half an hour. Resumable at any time.
Metric: loss per level; what it teaches is measured by configs/doom/self_forcing.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {"kind": "diffusion", "start": "runs/doom_teacher_forcing", "ema": 0.99}
    config.visibility = {"kind": "bidirectional"}
    # The first frame is given: clean, as self forcing will show it.
    config.levels = {"base": {"kind": "shared"}, "context": [{"kind": "clean_prefix", "probabilities": (0.0, 1.0)}]}
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
    config.plan = {"lag": 0}
    config.data = {"records": "data/doom", "frames": 6, "batch": 12}
    config.optimizers = {
        "student": {
            "name": "muon",
            "learning_rate": 0.005,
            "schedule": "cosine",
            "warmup": 20,
            "decay_steps": 400,
            "final_fraction": 0.05,
            "beta1": 0.95,
            "beta2": 0.98,
        }
    }
    config.training = {"steps": 400, "log_every": 20, "save_every": 100}
    return config
