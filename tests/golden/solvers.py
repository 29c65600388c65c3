"""What diffusers' multistep schedulers make of noise with a small velocity field.

`python -m tests.golden.solvers` (with the `parity` extra) writes the trajectories that the default suite compares with.
"""

from pathlib import Path

import numpy as np

ARRAYS = Path(__file__).with_name("solvers.npz")
SHAPE = (1, 2, 2, 3, 4)
# Name: vidar's solver, steps, and what each frame's first level is before the shift of 5.
CASES = {
    "unipc": ("UniPC", 50, 0.999),
    "unipc, from noise": ("UniPC", 20, 1.0),
    "unipc, few": ("UniPC", 3, 0.999),
    "dpm++": ("DPMPlusPlus", 50, 1.0),
    "dpm++, few": ("DPMPlusPlus", 4, 0.999),
}
SHIFT = 5.0


def noise() -> np.ndarray:
    """Where all trajectories start."""
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def velocity(x: np.ndarray, level: float) -> np.ndarray:
    """A field that is neither linear nor the same at all levels."""
    mix = 0.5 * np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32)
    return np.tanh(x @ mix) + np.float32(0.5 * level) * x


def trajectory(name: str) -> np.ndarray:
    """diffusers' frames after every step, `[steps, *SHAPE]`."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind, steps, start = CASES[name]
    settings = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    grid = np.linspace(start, 0, steps + 1)[:-1]
    if kind == "UniPC":
        scheduler = UniPCMultistepScheduler(**settings)
        scheduler.set_timesteps(sigmas=grid)
    else:
        scheduler = DPMSolverMultistepScheduler(**settings, algorithm_type="dpmsolver++")
        scheduler.set_timesteps(steps)
        shifted = SHIFT * grid / (1 + (SHIFT - 1) * grid)
        shifted[0] = min(shifted[0], 1 - 1e-6)
        scheduler.sigmas = torch.from_numpy(np.append(shifted, 0).astype(np.float32))
    x, frames = torch.from_numpy(noise()), []
    for index, time in enumerate(scheduler.timesteps):
        prediction = torch.from_numpy(velocity(x.numpy(), float(scheduler.sigmas[index])))
        x = scheduler.step(prediction, time, x).prev_sample
        frames.append(x.numpy())
    return np.stack(frames)


def main() -> None:
    """Writes the trajectories, the last of every five steps of long ones."""
    np.savez_compressed(ARRAYS, **{name: thinned(trajectory(name)) for name in CASES})


def thinned(frames: np.ndarray) -> np.ndarray:
    """The first steps, where orders change, and then every fifth."""
    return np.concatenate([frames[:5], frames[5::5], frames[-1:]])


if __name__ == "__main__":
    main()
