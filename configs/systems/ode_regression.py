"""ODE regression: a few-step causal student learns the ends of a bidirectional teacher's trajectories.

Paper: CausVid (arXiv 2412.07772, section 4.3), with the level list of Self Forcing.
Data: `vidar data trajectories --model runs/world_teacher --tfds vidar_world/one_shape --directory data/world --given 1
    --times 1000,750,500,250 --shift 5 --solver-steps 48 --count 4096 --output data/world_trajectories`;
    captions: `vidar data trajectories --model runs/captions_teacher --tfds vidar_world/captioned --directory data/world
    --times 1000,750,500,250 --shift 5 --solver-steps 16 --count 2048 --output data/captions_trajectories`;
    doom: `vidar data trajectories --model runs/doom_teacher --records data/doom --given 1 --times 1000,750,500,250
    --shift 5 --solver-steps 48 --count 4096 --output data/doom_trajectories`;
    wan_1_3b: the same from a published teacher and prompts, or `--lmdb` for the pairs that CausVid published.
Command: `vidar train --config configs/systems/ode_regression.py:BASE --workdir runs/BASE_ode`
    BASE is world (the default), doom, captions or wan_1_3b.
Hardware: world, doom and captions: 2 CPU cores; wan_1_3b: 8 TPU v5p, 3,000 updates in CausVid.
Metric: as self_forcing_dmd.py, which may start from it (`--config.objective.student=runs/BASE_ode`).
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config(base: str = "world") -> ConfigDict:
    """The experiment."""
    card = Path(__file__).with_name("self_forcing_dmd.py")
    config = load(f"{card}:{base or 'world'}").unlock()
    wan = base == "wan_1_3b"
    given = config.objective.forcing.get("given", 0)
    start = "Wan2.1-T2V-1.3B" if wan else config.objective.student
    config.objective = {"kind": "ode_regression", "given": given, "start": start, "ema": 0.99}
    for unused in ("teacher", "critic", "roles", "negative"):
        if unused in config:
            del config[unused]
    config.data.trajectories = f"data/{base or 'world'}_trajectories"
    if wan:
        del config.data.prompts
    del config.optimizers.critic
    config.solver.shift = 5.0  # that of the trajectories
    if wan:
        config.training.update({"steps": 3000})
    return config
