"""The second training of a few-step student on the captioned world: less guidance, and comparison under much noise.

Paper: none of its own; that guidance harms where there is much noise is that of guidance intervals (arXiv 2404.07724).
Command: `vidar train --config configs/captions/less_guided.py:SYSTEM --workdir runs/captions_SYSTEM`
    SYSTEM is self_forcing_dmd (the default) or causvid, after
    `vidar train --config configs/systems/SYSTEM.py:captions --workdir runs/captions_SYSTEM_guided`
Hardware: as the first training.
Metric: accuracy on captions that training never shows (`vidar eval captions`).
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config(system: str = "self_forcing_dmd") -> ConfigDict:
    """The experiment."""
    system = system or "self_forcing_dmd"
    card = Path(__file__).parent.parent / "systems" / f"{system}.py"
    config = load(f"{card}:captions").unlock()
    config.objective.student = f"runs/captions_{system}_guided"
    # Guidance enlarges what is named, presumably into a second one.
    config.objective.matching.guidance = ({"coefficient": 1.5}, {"coefficient": -0.5, "drops": ("text",)})
    config.objective.matching.guided_below = 1.0
    # Only under much noise does the teacher say that a second shape is too many, or comes too early.
    config.objective.matching.noise = {"shift": 30.0, "high": 0.995}
    config.optimizers.student.update({"schedule": "cosine", "decay_steps": 400})
    return config
