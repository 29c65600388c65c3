"""Diffusion forcing of a causal Wan 2.1 1.3B: every chunk at a level of its own, context as noisy as it comes.

Paper: the diffusion-forcing baseline of Self Forcing (arXiv 2506.08009).
Data: as teacher_forcing.py, which cannot be read yet.
Command: `vidar train --config configs/wan_1_3b/diffusion_forcing.py --workdir runs/wan_diffusion_forcing`
Hardware: as teacher_forcing.py, with half the tokens.
Metric: VBench; 82.95 in the paper with 50 steps and guidance.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher_forcing.py")).unlock()
    config.objective.kind = "diffusion"
    config.visibility = {"kind": "chunk_causal"}
    return config
