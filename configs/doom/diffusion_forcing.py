"""Diffusion forcing on recorded ViZDoom gameplay, fine-tuned from teacher forcing.

Paper: Diffusion Forcing (arXiv 2407.01392), with chunk-causal attention.
Data: `vidar data doom --output data/doom`
Command: `vidar train --config configs/doom/diffusion_forcing.py --workdir runs/doom_diffusion_forcing`
    (after teacher_forcing.py)
Hardware: 2 CPU cores, about half an hour. Resumable at any time.
Metric: `vidar eval turning --model runs/doom_diffusion_forcing --records data/doom --output runs/turning`
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load


def get_config() -> ConfigDict:
    """The experiment."""
    config = load(Path(__file__).with_name("teacher_forcing.py")).unlock()
    config.objective = {"kind": "diffusion", "start": "runs/doom_teacher_forcing", "ema": 0.99}
    config.visibility = {"kind": "chunk_causal"}
    config.levels = {"base": {"kind": "independent"}}
    config.optimizers.student.update({"learning_rate": 0.005, "decay_steps": 300})
    config.training.update({"steps": 300, "eval_every": 300, "sample_every": 300})
    return config
