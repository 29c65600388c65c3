"""CausVid: DMD on one parallel pass over noised clips, from a bidirectional teacher to a causal student.

Paper: CausVid (arXiv 2412.07772; its published settings for Wan 1.3B).
Command: `vidar train --config configs/systems/causvid.py:BASE --workdir runs/BASE_causvid`
    BASE and what comes before as for self_forcing_dmd.py; wan_1_3b needs latents of videos, which cannot be read yet.
    For captions the clips are the student's own rollouts after clean chunks.
Hardware: as self_forcing_dmd.py, with less time where there are no rollouts.
Metric: as self_forcing_dmd.py; wan_1_3b: VBench 82.88 / 83.93 / 78.69 as others measured it again.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config(base: str = "world") -> ConfigDict:
    """The experiment."""
    card = Path(__file__).with_name("self_forcing_dmd.py")
    config = load(f"{card}:{base or 'world'}").unlock()
    given = config.objective.forcing.get("given", 0)
    config.objective.forcing = {"kind": "diffusion", "given": given}
    if base == "captions":
        # Of noised data, it does not learn to mend what it made twice; after noisy chunks, one cannot know what it
        # follows.
        config.objective.forcing = {"kind": "teacher", "given": given, "simulated": True}
        config.visibility = {"kind": "teacher_forcing"}
        config.solver.shift = 5.0
    if base == "wan_1_3b":
        config.objective.matching.noise.shift = 8.0
        # The field's weight of 3.5.
        config.objective.matching.guidance = ({"coefficient": 4.5}, {"coefficient": -3.5, "drops": ("text",)})
        config.objective.update({"one_batch": True, "teacher": "Wan2.1-T2V-1.3B"})
        config.objective.ema = None
        config.teacher = config.critic
        del config.critic
        # Times 1000, 757 and 522 are taken as they are.
        config.solver = {"kind": "few_step", "times": (1000.0, 757.0, 522.0), "shift": 1.0}
        config.data = {"tfds": "videos", "directory": "data/wan", "frames": 81, "batch": 64}
        for optimizer in config.optimizers.values():
            optimizer.update({"learning_rate": 2e-6, "beta1": 0.9})
        config.training.update({"steps": 5000})
    return config
