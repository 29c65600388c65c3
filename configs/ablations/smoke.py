"""Teacher forcing against diffusion on the one-shape world, far too small to show anything: it shows that it all works.

Command: `vidar ablate configs/ablations/smoke.py --output runs/ablations/smoke`
Hardware: 2 CPU cores, two minutes; the data are made on the spot.
Metric: none that means anything; the format is that of `vidar/ablation/card.py`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The ablation."""
    config = ConfigDict()
    config.name = "smoke"
    config.text = "After eight updates, what differs is how networks that know nothing are sampled."
    config.world = {"clips": 64, "validation_clips": 8, "frames": 8}
    optimizer = {"name": "adamw", "learning_rate": 1e-3, "warmup": 2, "schedule": "constant"}
    config.base = {
        "card": "configs/world/teacher_forcing.py",
        "overrides": {
            "model": {"width": 32, "layers": 1, "heads": 2, "mlp": 32, "remat": False},
            "solver": {"kind": "few_step", "times": (1000.0, 500.0), "shift": 5.0},
            "optimizers": {"student": optimizer},
            "data": {"batch": 4, "cache_megabytes": 8},
            "training": {"steps": 4, "log_every": 2, "save_every": 4},
        },
    }
    config.stages = {"start": {"overrides": {"training": {"steps": 4}}}}
    config.factors = {
        "forcing": {
            "teacher": {"overrides": {"objective": {"start": "stage:start"}}},
            "diffusion": {
                "card": "configs/world/diffusion_forcing.py",
                "overrides": {
                    "objective": {"start": "stage:start"},
                    "solver": {"kind": "euler", "steps": 2},
                },
            },
        },
    }
    config.seeds = (0, 1)
    config.budget = {"unit": "updates", "amount": 8}
    config.evaluation = {
        "kind": "world",
        "clips": 4,
        "frames": 24,
        "given": 1,
        "spans": {"trained": (1, 8), "late": (16, 24)},
    }
    config.contrast = {"metric": "psnr", "span": "late", "better": ("teacher",), "worse": ("diffusion",)}
    config.control = {"corrupt": "commit", "amounts": (0.5, 1.0)}
    return config
