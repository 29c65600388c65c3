"""Bidirectional diffusion on recorded ViZDoom gameplay, fine-tuned from teacher forcing: the teacher of self forcing.

Paper: rectified flow (arXiv 2209.03003) over whole clips after a clean first frame, the others at one level.
Data: `vidar data doom --output data/doom`
Command: `vidar train --config configs/doom/teacher.py --workdir runs/doom_teacher`
    (after teacher_forcing.py)
Hardware: 2 CPU cores, about half an hour. Resumable at any time.
Metric: loss per level; what it teaches is measured by configs/systems/self_forcing_dmd.py:doom.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher_forcing.py")).unlock()
    config.objective = {"kind": "diffusion", "start": "runs/doom_teacher_forcing", "ema": 0.99}
    config.visibility = {"kind": "bidirectional"}
    # The first frame is given: clean, as self forcing will show it.
    config.levels = {"base": {"kind": "shared"}, "context": [{"kind": "clean_prefix", "probabilities": (0.0, 1.0)}]}
    config.plan = {"lag": 0}
    del config.solver, config.context
    config.optimizers.student.update({"learning_rate": 0.005, "decay_steps": 400})
    config.training = {"steps": 400, "log_every": 20, "save_every": 100}
    return config
