"""Teacher forcing on the captioned world, in chunks of two frames: the causal student, smaller than its teacher.

Paper: the teacher-forcing baseline of Self Forcing (arXiv 2506.08009, section 3), here from text.
Data: `vidar data world --config captioned --directory data/world --clips 16000 --frames 8`
Command: `vidar train --config configs/captions/teacher_forcing.py --workdir runs/captions_teacher_forcing`
Hardware: 2 CPU cores, an hour and a half; 16 tokens a frame, 8 frames a clip.
Metric: accuracy on captions that training never shows (`vidar eval captions`).
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher.py")).unlock()
    config.objective = {"kind": "teacher_forcing", "context_noise": 0.3, "ema": 0.995}
    config.visibility = {"kind": "teacher_forcing"}
    config.levels.base.kind = "independent"
    config.model.layers = 4
    config.solver = {"kind": "few_step", "times": (1000.0, 750.0, 500.0, 250.0), "shift": 5.0}
    config.plan = {"commit": {"kind": "extra_pass"}}
    del config.guidance
    config.optimizers.student.decay_steps = 6000
    config.training.steps = 6000
    return config
