"""Bidirectional diffusion on the one-shape world: the teacher of self forcing.

Paper: rectified flow (arXiv 2209.03003) over whole clips after a clean first frame, the others at one level.
Data: `vidar data world --directory data/world --frames 8`
Command: `vidar train --config configs/world/teacher.py --workdir runs/world_teacher`
Hardware: 2 CPU cores; 16 tokens a frame, 8 frames a clip.
Metric: loss per level; what it teaches is measured by `configs/systems/self_forcing_dmd.py`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher_forcing.py")).unlock()
    config.objective = {"kind": "diffusion", "ema": 0.99}
    config.visibility = {"kind": "bidirectional"}
    # The first frame is given: clean, as self forcing will show it.
    config.levels = {"base": {"kind": "shared"}, "context": [{"kind": "clean_prefix", "probabilities": (0.0, 1.0)}]}
    config.plan = {"lag": 0}
    del config.solver, config.context
    config.optimizers.student.decay_steps = 2000
    config.training = {"steps": 2000, "log_every": 20, "save_every": 200}
    return config
