"""Self forcing with DMD, from a causal student and a bidirectional teacher.

Paper: Self Forcing (arXiv 2506.08009, sections 3 and 4; its published settings for Wan 1.3B).
Command: `vidar train --config configs/systems/self_forcing_dmd.py:BASE --workdir runs/BASE_self_forcing`
    BASE is world (the default), doom, captions or wan_1_3b; all but wan_1_3b after their cards teacher_forcing.py and
    teacher.py. captions: the first of two trainings, configs/captions/less_guided.py is the second. wan_1_3b: published
    folders and Self Forcing's ode_init.pt, prompts, and their text states (`vidar data embeddings`, its `--negative`
    that of this card).
Hardware: 2 CPU cores; world takes a quarter of an hour, captions and doom half an hour. wan_1_3b: a 14B teacher, a 1.3B
    critic, 64 clips in 8 parts: 8 TPU v5p (`--lower-only --topology v5p:2x2x2` says what it takes), or H100 with
    `backend=cudnn` of model, teacher and critic; in the paper 64 H100, 2 hours.
Metric: world: `vidar eval world`; doom: `vidar eval turning`; captions: `vidar eval captions`; wan_1_3b: VBench 84.31 /
    85.07 / 81.28 in the paper.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vidar.config import load

CONFIGS = Path(__file__).parent.parent
# Wan's own negative prompt; compare it with the one beside the published weights.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)


def get_config(base: str = "world") -> ConfigDict:
    """The experiment."""
    config = load(CONFIGS / (base or "world") / "teacher_forcing.py").unlock()
    config.visibility = {"kind": "chunk_causal"}
    config.solver = {"kind": "few_step", "times": (1000.0, 750.0, 500.0, 250.0), "shift": 5.0}
    optimizer = {"name": "adamw", "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01}
    if base == "wan_1_3b":
        config.objective = {
            "kind": "distillation",
            "forcing": {"kind": "self"},
            # The field's weight of 3 between conditional and null is a scale of 4 here.
            "matching": {
                "kind": "dmd",
                "noise": {"shift": 5.0},
                "guidance": ({"coefficient": 4.0}, {"coefficient": -3.0, "drops": ("text",)}),
            },
            "student": "checkpoints/ode_init.pt",
            "teacher": "Wan2.1-T2V-14B",
            "critic": "Wan2.1-T2V-1.3B",
            "generator_every": 5,
            "ema": 0.99,
            "ema_start": 200,
        }
        config.teacher = {"preset": "wan_14b", "backend": "splash", "remat": True}
        config.critic = {"preset": "wan_1_3b", "backend": "splash", "remat": True}
        config.roles = {"teacher": {"dtype": "bfloat16"}}
        config.negative = NEGATIVE
        del config.levels
        config.data = {"prompts": "data/wan/prompts.txt", "frames": 81, "batch": 64}
        config.optimizers = {
            "student": optimizer | {"learning_rate": 2e-6, "clip": 10.0},
            "critic": optimizer | {"learning_rate": 4e-7, "clip": 10.0},
        }
        config.training.update({"steps": 600, "save_every": 50})
        return config
    base = base or "world"
    config.objective = {
        "kind": "distillation",
        "forcing": {"kind": "self", "given": 1},
        "matching": {"kind": "dmd", "noise": {"shift": 3.0}},
        "student": "runs/world_student" if base == "world" else f"runs/{base}_teacher_forcing",
        "teacher": f"runs/{base}_teacher",
        "generator_every": 2,
        "ema": 0.95,
        "ema_start": 10,
    }
    config.optimizers = {
        "student": optimizer | {"learning_rate": 1e-4, "warmup": 10},
        "critic": optimizer | {"learning_rate": 5e-4, "warmup": 10},
    }
    config.training.update({"steps": 300, "log_every": 10, "save_every": 100, "eval_every": 300, "sample_every": 300})
    if base == "captions":  # where everything comes from the text, and the teacher is larger than the student
        teacher = load(CONFIGS / base / "teacher.py")
        config.teacher = teacher.model
        config.objective.update({"generator_every": 3, "ema": 0.97})
        config.objective.forcing.given = 0
        # How many shapes there are, and when one enters, is decided under much noise, where guidance says too much.
        config.objective.matching.update({"guidance": teacher.guidance, "guided_below": 0.9, "noise": {"shift": 12.0}})
        config.solver.shift = 8.0
        config.optimizers.student.learning_rate = 2e-4
        config.training.steps = 1200
    return config
