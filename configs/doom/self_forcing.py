"""Self forcing with DMD on recorded ViZDoom gameplay, from the teacher-forced student and a bidirectional teacher.

Paper: Self Forcing (arXiv 2506.08009); a student update every second step, four solver steps.
Data: `vidar data doom --output data/doom`
Command: `vidar train --config configs/doom/self_forcing.py --workdir runs/doom_self_forcing`
    (after teacher_forcing.py and teacher.py)
Hardware: 2 CPU cores, about half an hour. Resumable at any time.
Metric: `vidar eval turning --model runs/doom_self_forcing --records data/doom --output runs/turning`
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher_forcing.py")).unlock()
    config.objective = {
        "kind": "self_forcing",
        "student": "runs/doom_teacher_forcing",
        "teacher": "runs/doom_teacher",
        "given": 1,
        "generator_every": 2,
        "shift": 3.0,
        "ema": 0.95,
        "ema_start": 20,
    }
    config.visibility = {"kind": "chunk_causal"}
    config.solver = {"kind": "few_step", "times": (1000.0, 750.0, 500.0, 250.0), "shift": 5.0}
    optimizer = {"name": "adamw", "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "warmup": 10}
    config.optimizers = {
        "student": optimizer | {"learning_rate": 1e-4},
        "critic": optimizer | {"learning_rate": 5e-4},
    }
    config.training.update({"steps": 200, "save_every": 50, "eval_every": 100, "sample_every": 100})
    return config
