"""`vidar quickstart`: the whole path in six minutes, or the shipped weights made again.

Makes data, trains teacher forcing from scratch, runs a few self-forcing updates from the shipped networks, streams both
models and compares them with the simulated truth.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

_logger = logging.getLogger("vidar")

CLIPS = 32
TRAINED = 8
STEPS = 400
STREAMED = 264
SHIPPED = "world.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="receives everything that is made")
    parser.add_argument("--minutes", type=float, default=3.5, help="time limit of the training from scratch, up to 60")
    parser.add_argument(
        "--remake", action="store_true", help="train the shipped networks again (about half an hour), instead"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the quickstart."""
    from vidar.data.world.builder import prepare
    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError

    if not 0 < options.minutes <= 60:
        raise ConfigError(f"--minutes={options.minutes:g} must be above 0 and at most 60")
    enable_compilation_cache()
    start = time.perf_counter()
    output = options.output.resolve()
    _banner(1, "data: clips of a procedural world")
    prepare(output / "data", "one_shape", clips=8192, frames=TRAINED)
    (_remake if options.remake else _tour)(output, options)
    _logger.info("done in %.1f minutes; everything is in %s", (time.perf_counter() - start) / 60, options.output)
    return 0


def shipped() -> Path:
    """The weights in the package: a self-forced student and its bidirectional teacher."""
    return Path(__file__).resolve().parent.parent / "assets" / SHIPPED


# ---------------------------------------------------------------------------------------------------------- the tour


def _tour(output: Path, options: argparse.Namespace) -> None:
    from vidar.evaluation.world import held_out
    from vidar.system import load

    quiet = {"training.save_every": 10_000, "training.eval_every": 10_000, "training.sample_every": 10_000}
    length = {
        "training.steps": STEPS,
        "optimizers.student.decay_steps": STEPS,
        "training.max_seconds": 60 * options.minutes,
    }
    few = {"training.steps": 11, "training.log_every": 5}
    weights = {"objective.student": str(shipped()), "objective.teacher": str(shipped())}
    # Both are composed before either begins: what does not fit is said at once.
    scratch = _compose("world/teacher_forcing", output / "data", **quiet, **length)
    forced = _compose("systems/self_forcing_dmd", output / "data", **quiet, **few, **weights)
    _banner(2, f"teacher forcing from scratch, at most {options.minutes:g} minutes")
    done = _train(scratch, output / "scratch", anew=True)
    _banner(3, "a few self-forcing updates from the shipped student and teacher")
    _train(forced, output / "self_forcing", anew=True)

    _banner(4, f"streaming {STREAMED} frames, {STREAMED // TRAINED} times the training length")
    truth = held_out(CLIPS, STREAMED)
    videos = {name: _stream(*load(source), truth) for name, source in
              (("from scratch", output / "scratch"), ("shipped", shipped()))}  # fmt: skip
    _banner(5, "comparison with the simulated truth")
    _show(output, videos, truth)
    more = "" if done == STEPS else "; with a larger --minutes it gets all of them"
    print(f"from scratch is a model of {done} of {STEPS} steps, from at most {options.minutes:g} minutes{more}")


def _compose(card: str, data: Path, **overrides: Any) -> Any:
    """An experiment card of `configs` as a run."""
    from vidar.training.experiment import load_run_config, make_run

    values = {"data.directory": str(data)} | overrides
    config = load_run_config(_card(card), tuple(f"--config.{name}={value}" for name, value in values.items()))
    return make_run(config)


def _train(run: Any, workdir: Path, anew: bool = False) -> int:
    """Trains, from the beginning or from where it stopped; returns the steps done.

    Ends the command where SIGTERM ended the training.
    """
    import shutil

    from vidar.training.loop import is_complete, train

    if anew:
        shutil.rmtree(workdir, ignore_errors=True)
    state = train(run, workdir)
    if not is_complete(run, state):
        raise KeyboardInterrupt
    return int(state.step)


def _card(name: str) -> Path:
    from vidar.errors import ConfigError

    path = Path(__file__).resolve().parent.parent.parent / "configs" / f"{name}.py"
    if not path.is_file():
        raise ConfigError(f"{path}: missing; run the quickstart from a clone of the repository (pip install -e .)")
    return path


def _stream(system: Any, model: Any, truth: Any) -> Any:
    """Streams every held-out sequence from its first frame, all at once."""
    import numpy as np
    from tqdm import tqdm

    from vidar.streaming import Engine
    from vidar.system import streaming_sampler

    engine = Engine(streaming_sampler(system), system.config.codec, model, rows=len(truth.actions))
    engine.open(seed=0, given=truth.pixels[:, :1], label=truth.label if model.config.classes else None)
    ticks = (truth.actions[:, frame : frame + 1] for frame in range(1, truth.actions.shape[1]))
    chunks = [truth.pixels[:, :1]]
    with tqdm(total=truth.actions.shape[1] - 1, unit="frame") as bar:
        for frames in engine.frames(ticks):
            chunks.append(frames)
            bar.update()
    return np.concatenate(chunks, axis=1)


def _show(output: Path, videos: dict[str, Any], truth: Any) -> None:
    """Writes videos, contact sheet, drift plot and table."""
    import json

    import numpy as np

    from vidar.data.video import write_video
    from vidar.evaluation.drift import drift, plot
    from vidar.evaluation.sheets import contact_sheet
    from vidar.evaluation.world import score, standing_still

    rollouts = {"repeated": standing_still(truth), **videos}
    scores = {name: score(video, truth) for name, video in rollouts.items()}
    spans = {f"{frames} frames": (1, frames) for frames in (TRAINED, 16 * TRAINED, STREAMED)}
    spans["last quarter"] = (STREAMED * 3 // 4, STREAMED)
    table = {
        name: {span: entry.part(*limits).summary() for span, limits in spans.items()} for name, entry in scores.items()
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(table, indent=2) + "\n")
    curves = {
        name: drift(video, truth.pixels, {"position_error": scores[name].error, "identity_kept": scores[name].identity})
        for name, video in videos.items()
    }
    plot(curves, output / "drift.png")
    rows = {}
    for row in range(3):
        rows[f"truth {row}"] = truth.pixels[row]
        rows |= {f"{name} {row}": video[row] for name, video in videos.items()}
    contact_sheet(rows, output / "sheet.png", columns=12, tile=64)
    for name, video in videos.items():
        above = np.concatenate(list(truth.pixels[:8]), axis=2)
        below = np.concatenate(list(video[:8]), axis=2)
        write_video(output / f"{name.replace(' ', '_')}.mp4", np.concatenate([above, below], axis=1), fps=8)
    radius = truth.config.radius
    print(f"\n{CLIPS} held-out sequences; position error in pixels (object radius {radius:g}), mean [95 % interval]")
    for name, by_span in table.items():
        for span, values in by_span.items():
            cells = "  ".join(
                f"{metric} {mean:.3f} [{low:.3f}, {high:.3f}]" for metric, (mean, low, high) in values.items()
            )
            print(f"  {name:15s} {span:16s} {cells}")
    print(f"videos (truth above, model below), sheet.png, drift.png and results.json are in {output}")


# -------------------------------------------------------------------------------------------------------- the remake


def _remake(output: Path, options: argparse.Namespace) -> None:
    """Trains student, teacher and self forcing as their cards say, and writes the two networks into one file."""
    from vidar.evaluation.world import held_out, score
    from vidar.system import load
    from vidar.training.experiment import portable_dict
    from vidar.weights import save_weights

    runs = output / "remake"
    stages: dict[str, dict[str, Any]] = {
        "world/teacher_forcing": {},
        "world/teacher": {},
        "systems/self_forcing_dmd": {
            "objective.student": str(runs / "world/teacher_forcing"),
            "objective.teacher": str(runs / "world/teacher"),
        },
    }
    for number, (card, overrides) in enumerate(stages.items(), start=2):
        _banner(number, f"configs/{card}.py (resumes where it stopped)")
        _train(_compose(card, output / "data", **overrides), runs / card)
    _banner(5, "the networks, and what they are worth")
    system, student = load(runs / "systems/self_forcing_dmd")
    teacher_system, teacher = load(runs / "world/teacher")
    path = output / SHIPPED
    systems = {"student": portable_dict(system.config), "teacher": portable_dict(teacher_system.config)}
    save_weights(path, {"student": student, "teacher": teacher}, {"systems": systems}, dtype="bfloat16")
    truth = held_out(CLIPS, STREAMED)
    for name, source in (("shipped", shipped()), ("made again", path)):
        if source.is_file():
            result = score(_stream(*load(source), truth), truth).part(1, STREAMED).summary()
            print(name, {metric: tuple(round(value, 3) for value in values) for metric, values in result.items()})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB; copy it to {shipped()} to ship it")


def _banner(number: int, text: str) -> None:
    _logger.info("── %d. %s", number, text)
