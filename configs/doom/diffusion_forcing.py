"""Diffusion forcing on recorded ViZDoom gameplay, fine-tuned from teacher forcing.

Paper: Diffusion Forcing (arXiv 2407.01392), with chunk-causal attention.
Data: `vidar data doom --output data/doom`
Command: `vidar train --config configs/doom/diffusion_forcing.py --workdir runs/doom_diffusion_forcing`
    (after teacher_forcing.py)
Hardware: 2 CPU cores, about half an hour. Resumable at any time.
Metric: `vidar eval turning --model runs/doom_diffusion_forcing --records data/doom --output runs/turning`
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {"kind": "diffusion", "start": "runs/doom_teacher_forcing", "ema": 0.99}
    config.visibility = {"kind": "chunk_causal"}
    config.levels = {"base": {"kind": "independent"}}
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
            "learning_rate": 0.005,
            "schedule": "cosine",
            "warmup": 20,
            "decay_steps": 300,
            "final_fraction": 0.05,
            "beta1": 0.95,
            "beta2": 0.98,
        }
    }
    config.training = {"steps": 300, "log_every": 20, "save_every": 100, "eval_every": 300, "sample_every": 300}
    return config
