"""Diffusion forcing on the one-shape world: every chunk at a level of its own, context as noisy as it comes.

Paper: Diffusion Forcing (arXiv 2407.01392), with chunk-causal attention.
Data: `vidar data world --directory data/world --frames 8`
Command: `vidar train --config configs/world/diffusion_forcing.py --workdir runs/world_diffusion_forcing`
Hardware: 2 CPU cores; 16 tokens a frame, 8 frames a clip.
Metric: as for teacher_forcing.py (`vidar eval world`).
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher_forcing.py")).unlock()
    config.objective = {"kind": "diffusion", "ema": 0.99}
    config.visibility = {"kind": "chunk_causal"}
    config.levels = {"base": {"kind": "independent"}}
    config.solver = {"kind": "euler", "steps": 8}
    del config.plan
    return config
