"""Teacher, diffusion and self forcing, frame by frame, on recorded ViZDoom gameplay.

Paper: the ablation of Self Forcing (arXiv 2506.08009, table 2), here as an action-conditioned world model.
Data: `vidar data doom --output data/doom`
Command: `vidar ablate configs/ablations/doom.py --output runs/ablations/doom`
Hardware: one CPU core, an hour; resumable after any stop.
Metric: sharpness error past the training length, under the recorded actions: self forcing below teacher forcing.

All students start from one that teacher forcing trained without any noise on its context, and spend the same number of
updates; all are sampled in the same four steps, through the same cache.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The ablation."""
    config = ConfigDict()
    config.name = "doom"
    config.text = (
        "Does training on the student's own rollouts remove exposure bias on real gameplay? One backbone, one start, "
        "one sampler; what differs is where a frame's context comes from, and what the result is compared with."
    )
    student = {"name": "adamw", "learning_rate": 2e-4, "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "warmup": 10}
    constant = student | {"schedule": "constant"}
    pretraining = {
        "name": "muon", "learning_rate": 0.02, "schedule": "cosine", "warmup": 20, "final_fraction": 0.02,
        "beta1": 0.95, "beta2": 0.98,
    }  # fmt: skip
    config.base = {
        "card": "configs/doom/teacher_forcing.py",
        "overrides": {
            "objective": {"kind": "teacher_forcing", "context_noise": 0.0, "ema": 0.95},
            "solver": {"kind": "few_step", "times": (1000.0, 750.0, 500.0, 250.0), "shift": 5.0},
            "data": {"batch": 4},
            "optimizers": {"student": constant},
            "training": {"log_every": 10, "save_every": 20, "keep": 1, "eval_every": None, "sample_every": None},
        },
    }
    config.stages = {
        "start": {
            "overrides": {
                "objective": {"ema": 0.99},
                "data": {"batch": 8},
                "optimizers": {"student": pretraining | {"decay_steps": 1200}},
                "training": {"steps": 1200, "log_every": 20, "save_every": 100},
            },
        },
        "judge": {
            "card": "configs/doom/teacher.py",
            "overrides": {
                "objective": {"start": "stage:start"},
                "data": {"batch": 8},
                "optimizers": {"student": pretraining | {"learning_rate": 0.01, "decay_steps": 600}},
                "training": {"steps": 600, "log_every": 20, "save_every": 100},
            },
        },
    }
    distillation = {
        "kind": "distillation",
        "forcing": {"kind": "self", "given": 1},
        "matching": {"kind": "dmd", "noise": {"shift": 3.0}},
        "student": "stage:start",
        "teacher": "stage:judge",
        "generator_every": 3,
        "ema": 0.95,
        "ema_start": 0,
    }
    diffusion = {"kind": "diffusion", "start": "stage:start", "ema": 0.95}
    config.factors = {
        "forcing": {
            "teacher": {"overrides": {"objective": {"start": "stage:start"}}},
            "diffusion": {
                "overrides": {
                    "objective": diffusion,
                    "visibility": {"kind": "chunk_causal"},
                    "levels": {"base": {"kind": "independent"}},
                }
            },
            "self": {
                "overrides": {
                    "objective": distillation,
                    "visibility": {"kind": "chunk_causal"},
                    "optimizers": {"student": constant, "critic": constant | {"learning_rate": 1e-3}},
                }
            },
        },
    }
    config.seeds = (0, 1, 2)
    config.budget = {"unit": "updates", "amount": 120}
    config.evaluation = {
        "kind": "doom",
        "records": "data/doom",
        "clips": 24,
        "frames": 48,
        "given": 1,
        "turns": 8,
        "spans": {"trained": (1, 6), "past": (6, 24), "far": (24, 48)},
    }
    config.contrast = {"metric": "sharpness_error", "span": "past", "better": ("self",), "worse": ("teacher",)}
    config.control = {"corrupt": "commit", "amounts": (0.05, 0.1, 0.2, 0.4), "cells": ("teacher",)}
    return config
