"""Bidirectional text-to-video on the captioned world, with a byte-level text encoder trained from scratch.

Papers: rectified flow (arXiv 2209.03003) over whole clips at one level; classifier-free guidance (arXiv 2207.12598).
Data: `vidar data world --config captioned --directory data/world --clips 16000 --frames 8`
Command: `vidar train --config configs/captions/teacher.py --workdir runs/captions_teacher`
Hardware: 2 CPU cores, about an hour and a half; 16 tokens a frame, 8 frames a clip.
Metric: accuracy on captions that training never shows (`vidar eval captions`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {"kind": "diffusion", "ema": 0.995}
    config.visibility = {"kind": "bidirectional"}
    # Where shapes are is decided while there is much noise: what eight frames repeat stands out of it early.
    config.levels = {"base": {"kind": "shared"}, "marginal": {"kind": "uniform", "shift": 3.0}}
    config.video = {"height": 20, "width": 20, "frames": 8, "chunk": 2}
    config.codec = {"kind": "pixel", "patch": 5, "mean": -0.75, "deviation": 0.35}
    config.model = {
        "width": 96,
        "layers": 6,
        "heads": 2,
        "mlp": 384,
        "channels": 75,
        "text": {"width": 64, "length": 64, "encoder": {"layers": 3, "heads": 2, "mlp": 192}},
        "precision": {"compute": "float32"},
        "remat": True,
    }
    # Noise that is drawn afresh at every step mends what went wrong before, such as a shape that is there twice.
    config.solver = {"kind": "few_step", "times": tuple(1000 * (1 - step / 32) for step in range(32)), "shift": 3.0}
    config.plan = {"lag": 0}
    config.guidance = ({"coefficient": 3.0}, {"coefficient": -2.0, "drops": ("text",)})
    config.drop = 0.1
    config.evaluation = {"given": 0}  # everything comes from the text
    config.data = {"tfds": "vidar_world/captioned", "directory": "data/world", "frames": 8, "batch": 24}
    config.optimizers = {
        "student": {
            "name": "muon",
            "learning_rate": 0.02,
            "schedule": "cosine",
            "warmup": 20,
            "decay_steps": 8000,
            "final_fraction": 0.02,
            "beta1": 0.95,
            "beta2": 0.98,
        }
    }
    config.training = {"steps": 8000, "log_every": 20, "save_every": 200}
    return config
