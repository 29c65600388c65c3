"""Teacher, diffusion and self forcing and CausVid, frame by frame and in chunks of two, on the one-shape world.

Paper: the ablation of Self Forcing (arXiv 2506.08009, table 2), asked of errors that can be measured exactly.
Command: `vidar ablate configs/ablations/forcing.py --output runs/ablations/forcing`
Hardware: 2 CPU cores, about five hours on one of them; resumable after any stop. The data are made on the spot.
Metric: position error past the training length, frame-wise: self forcing below teacher forcing.

All students start from one that teacher forcing trained without any noise on its context, and spend the same number of
updates; all are sampled in the same four steps, through the same cache.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The ablation."""
    config = ConfigDict()
    config.name = "forcing"
    config.text = (
        "Does training on the student's own rollouts remove exposure bias? One backbone, one start, one sampler; "
        "what differs is where a training chunk's context comes from, and what the result is compared with."
    )
    config.world = {"clips": 8192, "validation_clips": 64, "frames": 16}
    student = {"name": "adamw", "learning_rate": 2e-4, "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "warmup": 10}
    pretraining = {
        "name": "muon", "learning_rate": 0.02, "schedule": "cosine", "warmup": 20, "final_fraction": 0.02,
        "beta1": 0.95, "beta2": 0.98,
    }  # fmt: skip
    config.base = {
        "card": "configs/world/teacher_forcing.py",
        "overrides": {
            "objective": {"kind": "teacher_forcing", "context_noise": 0.0, "ema": 0.95},
            "plan": {"commit": {"kind": "extra_pass", "level": 0.0, "noise": False}},
            "context": {"window": 6, "sink": 2, "positions": "relative"},
            "data": {"batch": 16},
            "optimizers": {"student": student | {"schedule": "constant"}},
            "training": {"log_every": 10, "save_every": 20, "keep": 1, "eval_every": None, "sample_every": None},
        },
    }
    long = {"steps": 1600, "log_every": 20, "save_every": 100}
    begun = {
        "objective": {"ema": 0.99},
        "optimizers": {"student": pretraining | {"decay_steps": 1600}},
        "training": long,
    }
    pairs = {"video": {"chunk": 2}}
    config.stages = {
        "frame_start": {"overrides": begun},
        "chunk_start": {"overrides": begun | pairs},
        "judge": {
            "card": "configs/world/teacher.py",
            "overrides": {
                # Two frames are given, as in every rollout.
                "levels": {
                    "base": {"kind": "shared"},
                    "context": [{"kind": "clean_prefix", "probabilities": (0.0, 0.0, 1.0)}],
                },
                "objective": {"kind": "diffusion", "ema": 0.99},
                "data": {"batch": 16},
                "optimizers": {"student": pretraining | {"decay_steps": 2000}},
                "training": {"steps": 2000, "log_every": 20, "save_every": 100, "eval_every": None},
            },
        },
    }
    critic = student | {"learning_rate": 1e-3, "schedule": "constant"}
    distilled = {
        "visibility": {"kind": "chunk_causal"},
        "optimizers": {"student": student | {"schedule": "constant"}, "critic": critic},
    }

    def distillation(forcing: str, matching: dict) -> dict:
        return distilled | {
            "objective": {
                "kind": "distillation",
                "forcing": {"kind": forcing, "given": 2},
                "matching": matching,
                "teacher": "stage:judge",
                "generator_every": 3,
                "ema": 0.95,
                "ema_start": 0,
            }
        }

    scores = {"kind": "dmd", "noise": {"shift": 3.0}}
    config.factors = {
        "chunking": {"frame": {}, "chunk": {"overrides": pairs}},
        "forcing": {
            "teacher": {},
            "diffusion": {
                "overrides": {
                    "objective": {"kind": "diffusion", "ema": 0.95},
                    "visibility": {"kind": "chunk_causal"},
                    "levels": {"base": {"kind": "independent"}},
                }
            },
            "self": {"overrides": distillation("self", scores)},
            "causvid": {"overrides": distillation("diffusion", scores)},
        },
    }
    start = {"frame": "stage:frame_start", "chunk": "stage:chunk_start"}
    config.combinations = []
    for chunking, stage in start.items():
        for forcing in ("teacher", "diffusion"):
            where = {"chunking": chunking, "forcing": forcing}
            config.combinations += [{"where": where, "overrides": {"objective": {"start": stage}}}]
        for forcing in ("self", "causvid"):
            given = {"given": 2 if chunking == "frame" else 1}
            where = {"chunking": chunking, "forcing": forcing}
            changes = {"objective": {"student": stage, "forcing": given}}
            config.combinations += [{"where": where, "overrides": changes}]
    gan = {"kind": "gan", "noise": {"shift": 3.0}, "heads": {"taps": (1, 3)}, "penalty_real": 0.1, "penalty_fake": 0.1}
    config.extra = {}
    for name, matching in (("sid", {"kind": "sid", "noise": {"shift": 3.0}}), ("gan", gan)):
        changed = distillation("self", matching) | pairs
        changed["objective"] = changed["objective"] | {"student": "stage:chunk_start"}
        changed["objective"]["forcing"] = {"kind": "self", "given": 1}
        config.extra[f"chunk_self_{name}"] = {"overrides": changed}
    config.seeds = (0, 1, 2)
    config.budget = {"unit": "updates", "amount": 150}
    config.evaluation = {
        "kind": "world",
        "clips": 128,
        "frames": 128,
        "given": 2,
        "spans": {"trained": (2, 8), "past": (8, 32), "far": (32, 128)},
    }
    config.contrast = {
        "metric": "position_error",
        "span": "past",
        "better": ("frame-self",),
        "worse": ("frame-teacher",),
    }
    config.control = {"corrupt": "commit", "amounts": (0.05, 0.1, 0.2, 0.4), "cells": ("frame-teacher",)}
    return config
