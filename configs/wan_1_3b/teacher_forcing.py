"""Teacher forcing of a causal Wan 2.1 1.3B, chunk-wise: the base of the Wan cards.

Paper: the teacher-forcing baseline of Self Forcing (arXiv 2506.08009), with the settings that Causal Forcing published.
Data: 81 frames of 480×832 as latents of Wan's VAE, which cannot be read yet, and text states (`vidar data embeddings`).
Command: `vidar train --config configs/wan_1_3b/teacher_forcing.py --workdir runs/wan_1_3b_teacher_forcing`
    (`--lower-only --topology v5p:2x2x2` says what a step takes, without data or weights)
Hardware: 8 TPU v5p, or 8 H100 with `--config.model.backend=cudnn`; published runs take 2,000 updates, better 5,000 to
    10,000.
Metric: VBench with extended prompts; 83.58 in the paper with 50 steps and guidance.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The experiment."""
    config = ConfigDict()
    config.objective = {"kind": "teacher_forcing", "weight": "bump", "shift": 5.0, "ema": 0.99, "ema_start": 200}
    config.objective["start"] = "Wan2.1-T2V-1.3B"  # the folder
    config.visibility = {"kind": "teacher_forcing"}
    config.levels = {"base": {"kind": "independent"}, "marginal": {"kind": "uniform", "shift": 5.0}}
    config.video = {"height": 480, "width": 832, "frames": 21, "chunk": 3}
    config.codec = {"kind": "wan_vae"}
    config.model = {"preset": "wan_1_3b", "backend": "splash", "remat": True}
    config.solver = {"kind": "unipc", "steps": 50, "shift": 5.0}
    config.embeddings = "data/wan/embeddings"
    config.data = {"tfds": "videos", "directory": "data/wan", "frames": 81, "batch": 64}
    config.optimizers = {
        "student": {
            "name": "adamw",
            "learning_rate": 2e-6,
            "beta1": 0.0,
            "beta2": 0.999,
            "weight_decay": 0.01,
            "clip": 10.0,
        }
    }
    config.mesh = {"fsdp": -1}
    config.training = {"steps": 2000, "log_every": 10, "save_every": 100, "accumulate": 8}
    return config
