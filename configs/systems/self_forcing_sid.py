"""Self forcing with SiD: both scores are differentiated; teacher and critic have one size.

Paper: Self Forcing (arXiv 2506.08009), SiD (arXiv 2404.04057).
Command: `vidar train --config configs/systems/self_forcing_sid.py:BASE --workdir runs/BASE_self_forcing_sid`
    BASE and what comes before as for self_forcing_dmd.py.
Hardware: as self_forcing_dmd.py, with a third more memory for the gradients of both scores.
Metric: as self_forcing_dmd.py; wan_1_3b: VBench 84.07 / 85.52 / 78.24 in the paper.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config(base: str = "world") -> ConfigDict:
    """The experiment."""
    card = Path(__file__).with_name("self_forcing_dmd.py")
    config = load(f"{card}:{base or 'world'}").unlock()
    config.objective.matching.kind = "sid"
    if base == "wan_1_3b":
        # The published run has a teacher of 1.3B, and a critic that learns five times faster, without decay.
        config.objective.teacher = "Wan2.1-T2V-1.3B"
        config.teacher = config.critic
        del config.critic
        config.optimizers.critic.update({"learning_rate": 2e-6})
        config.optimizers.student.weight_decay = config.optimizers.critic.weight_decay = 0.0
    return config
