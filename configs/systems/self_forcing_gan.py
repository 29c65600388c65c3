"""Self forcing against data, by a discriminator on the critic's features instead of a teacher's score.

Paper: Self Forcing (arXiv 2506.08009), relativistic with penalties on the slope (R3GAN, arXiv 2501.05441).
Command: `vidar train --config configs/systems/self_forcing_gan.py:BASE --workdir runs/BASE_self_forcing_gan`
    BASE and what comes before as for self_forcing_dmd.py; wan_1_3b needs latents of videos, which cannot be
    read yet.
Hardware: as self_forcing_dmd.py, without the teacher.
Metric: as self_forcing_dmd.py; wan_1_3b: VBench 83.88 / 85.06 / 79.16 in the paper, on 70,000 videos made by Wan 14B.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config(base: str = "world") -> ConfigDict:
    """The experiment."""
    card = Path(__file__).with_name("self_forcing_dmd.py")
    config = load(f"{card}:{base or 'world'}").unlock()
    matching = {"kind": "gan", "relativistic": True, "penalty_real": 0.1, "penalty_fake": 0.1, "warmup": 20}
    matching["noise"] = {"low": 0.02, "high": 0.98, "shift": config.objective.matching.noise.shift}
    matching["heads"] = {"taps": (-5, -3, -1)} if base != "doom" else {"taps": (-3, -2, -1)}
    if base == "wan_1_3b":
        matching["heads"] = {"taps": (-17, -9, -1)}
        config.objective.teacher = "Wan2.1-T2V-1.3B"
        del config.teacher, config.roles, config.negative
        config.data = {"tfds": "videos", "directory": "data/wan", "frames": 81, "batch": 64}
    config.objective.matching = matching
    return config
