"""Resampling forcing on longer clips of the one-shape world, from the student of teacher_forcing.py.

Paper: Resampling Forcing (arXiv 2512.15702): the history carries the student's own errors, and no teacher is needed.
Data: `vidar data world --directory data/world16 --frames 16`
Command: `vidar train --config configs/world/long.py --workdir runs/world_long`
Hardware: 2 CPU cores; 16 tokens a frame, 16 frames a clip: the shape walks far from where the first frame shows it;
    a wider window than that of the first stage, so that errors add up more slowly.
Metric: position error of the generated shape against the simulated truth, from one given frame (`vidar quickstart`).
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher_forcing.py")).unlock()
    config.objective = {
        "kind": "teacher_forcing",
        "start": "runs/world_student",
        "resample": True,
        "context_noise": 0.5,
        "ema": 0.99,
    }
    config.video.frames = 16
    config.context.window = 6
    config.data.update({"directory": "data/world16", "frames": 16, "batch": 12})
    config.optimizers.student.update({"learning_rate": 0.015, "decay_steps": 700})
    config.training.update({"steps": 700, "eval_every": 350, "sample_every": 350})
    return config
