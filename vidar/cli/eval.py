"""`vidar eval`: measures a trained model: control by actions, exact errors on the procedural world, or captions."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    turn = kinds.add_parser("turning", help="left against right on recorded gameplay, by optical flow")
    turn.add_argument("--model", required=True, nargs="+", help="directories of runs, or .safetensors files")
    turn.add_argument("--records", required=True, help="recording with a validation split")
    turn.add_argument("--starts", type=int, default=50, help="held-out starts, each turned both ways")
    turn.add_argument("--given", type=int, default=2, help="given frames of each start")
    turn.add_argument("--frames", type=int, default=10, help="frames of each video, given ones included")
    turn.add_argument("--output", type=Path, required=True, help="receives turning.json and a contact sheet a model")
    turn.set_defaults(run=_turning)
    from vidar.cli import drift

    drift.add_arguments(kinds.add_parser("drift", help="how any videos change with the index of their frames"))
    world = kinds.add_parser("world", help="position, identity and colour on the one-shape world")
    world.add_argument("--model", required=True, nargs="+", help="directories of runs, or .safetensors files")
    world.add_argument("--clips", type=int, default=32, help="held-out clips")
    world.add_argument("--frames", type=int, default=8, help="frames of each video, the given first one included")
    world.add_argument("--output", type=Path, help="receives world.json and a contact sheet a model")
    world.set_defaults(run=_world)
    text = kinds.add_parser("captions", help="facts of held-out captions in clips of the captioned world")
    text.add_argument("--model", required=True, nargs="+", help="directories of runs, or .safetensors files")
    text.add_argument("--captions", type=int, default=256, help="held-out captions")
    text.add_argument("--seed", type=int, default=0, help="of captions and noise")
    text.add_argument("--output", type=Path, required=True, help="receives captions.json and a contact sheet a model")
    text.set_defaults(run=_captions)


def _turning(options: argparse.Namespace) -> int:
    import numpy as np

    from vidar.data.pipeline import DataConfig, make_dataset, open_source
    from vidar.data.records import Episodes
    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError, check_range, make_directory
    from vidar.evaluation.control import turning
    from vidar.evaluation.form import Form
    from vidar.evaluation.sheets import contact_sheet

    check_range("--starts", options.starts, least=1)
    check_range("--given", options.given, least=1)
    check_range("--frames", options.frames, above=options.given)
    titles = _titles(options.model)
    source = DataConfig(
        records=options.records,
        split="validation",
        frames=options.given,
        stride=37,
        batch=options.starts,
        shuffle=True,
        seed=1,
    )
    check_range("--starts", options.starts, most=len(open_source(source)))
    enable_compilation_cache()
    form = Episodes(options.records, "validation").form
    spec = form.actions
    names = () if spec is None else spec.names
    if not {"turn_left", "turn_right"} <= set(names):
        raise ConfigError(
            f"{options.records}: needs actions turn_left and turn_right, has {', '.join(names) or 'none'}"
        )
    left, right = (list(names).index(name) for name in ("turn_left", "turn_right"))
    shown = Form(options.records, (form.size[0], form.size[1]), max(left, right) + 1)
    models = [_loaded(source, shown) for source in options.model]
    make_directory(options.output)
    starts = next(iter(make_dataset(source)))["pixels"]
    report = {}
    for name, pipeline in zip(titles, models, strict=True):

        def generate(given: np.ndarray, actions: np.ndarray, pipeline=pipeline) -> np.ndarray:
            # Both turns of a start share their seed: the first half of the rows is repeated as the second.
            half = len(given) // 2
            parts = [
                pipeline.generate(options.frames, actions=actions[part], given=given[part])
                for part in (slice(0, half), slice(half, None))
            ]
            return np.concatenate(parts)

        result = turning(generate, starts, options.frames, left, right)
        control = turning(generate, starts, options.frames, left, right, np.random.default_rng(0))
        report[name] = {
            "right sign": result.share,
            "95 % interval": [result.low, result.high],
            "p": result.probability,
            "flow left": float(result.flow_left.mean()),
            "flow right": float(result.flow_right.mean()),
            "shuffled": control.share,
            "shuffled p": control.probability,
        }
        print(
            f"{name:28s} right sign {result.share:.1%} [{result.low:.1%}, {result.high:.1%}]  flow left "
            f"{result.flow_left.mean():+.2f} right {result.flow_right.mean():+.2f} px/frame  "
            f"shuffled {control.share:.1%}"
        )
        rows = {}
        for row in range(min(4, options.starts)):
            rows |= {f"left {row}": result.videos[row], f"right {row}": result.videos[options.starts + row]}
        contact_sheet(rows, options.output / f"{name}.png", columns=options.frames)
    _save(options.output / "turning.json", report)
    return 0


def _world(options: argparse.Namespace) -> int:
    from vidar.devices import enable_compilation_cache
    from vidar.errors import check_range, make_directory
    from vidar.evaluation.sheets import contact_sheet
    from vidar.evaluation.world import FORM, held_out, score, standing_still

    check_range("--clips", options.clips, least=1)
    check_range("--frames", options.frames, least=2)
    titles = _titles(options.model)
    if options.output is not None:
        make_directory(options.output)
    enable_compilation_cache()
    truth = held_out(options.clips, options.frames)
    videos = {"repeated": standing_still(truth)}
    models = [_loaded(source, FORM) for source in options.model]
    for name, pipeline in zip(titles, models, strict=True):
        label = truth.label if pipeline.model.config.classes else None
        videos[name] = pipeline.generate(options.frames, actions=truth.actions, given=truth.pixels[:, :1], label=label)
    report = {}
    for name, video in videos.items():
        report[name] = score(video, truth).part(1, options.frames).summary()
        cells = "  ".join(
            f"{metric} {mean:.3f} [{low:.3f}, {high:.3f}]" for metric, (mean, low, high) in report[name].items()
        )
        print(f"{name:32s} {cells}")
    print(
        f"over frames 1 to {options.frames - 1} of {options.clips} clips, with the 95 % interval of the mean over "
        "clips: distance from the true position in pixels (a shape that vanished: the frame's side), share of frames "
        "with the right kind and colour, and with the right colour; repeated: the given frame, again and again"
    )
    if options.output is not None:
        _save(options.output / "world.json", {"clips": options.clips, "frames": options.frames, "models": report})
        for name, video in videos.items():
            rows = {}
            for row in range(min(4, options.clips)):
                rows |= {f"truth {row}": truth.pixels[row], f"generated {row}": video[row]}
            contact_sheet(rows, options.output / f"{name}.png")
    return 0


def _captions(options: argparse.Namespace) -> int:
    from vidar.devices import enable_compilation_cache
    from vidar.errors import check_range, make_directory
    from vidar.evaluation.captions import accuracy, held_out
    from vidar.evaluation.metrics import SEEDS, first_of
    from vidar.evaluation.sheets import contact_sheet

    check_range("--captions", options.captions, least=1)
    check_range("--seed", options.seed, least=0, below=SEEDS)
    titles = _titles(options.model)
    enable_compilation_cache()
    truth = held_out(options.captions, options.seed)
    models = [_reader_of_text(source, truth.pixels.shape[1:4]) for source in options.model]
    make_directory(options.output)
    report: dict[str, Any] = {"true clips": {"accuracy": accuracy(truth.pixels, truth.captions).summary()}}
    for name, pipeline in zip(titles, models, strict=True):
        video = pipeline.generate(truth.pixels.shape[1], prompts=truth.captions, seed=first_of(options.seed))
        report[name] = {"accuracy": accuracy(video, truth.captions).summary()} | _latency(pipeline, truth.captions)
        shown = {f"{row} {text}": video[row] for row, text in enumerate(truth.captions[:16])}
        contact_sheet(shown, options.output / f"{name}.png", tile=64)
    for name, entry in report.items():
        cells = "  ".join(
            f"{fact} {mean:.1%} [{low:.1%}, {high:.1%}]" for fact, (mean, low, high) in entry["accuracy"].items()
        )
        late = f"  first frame {1e3 * entry['first_frame_s']:.0f} ms" if "first_frame_s" in entry else ""
        print(f"{name:24s} {cells}{late}")
    _save(options.output / "captions.json", {"captions": options.captions, "seed": options.seed, "models": report})
    return 0


def _save(path: Path, report: Any) -> None:
    import json

    from vidar.evaluation.writing import replaced

    with replaced(path) as unfinished:
        unfinished.write_text(json.dumps(report, indent=2) + "\n")


def _latency(pipeline: Any, prompts: Sequence[str], repeats: int = 9) -> dict[str, Any]:
    """Seconds from a prompt to the first frame on the host: that of the first chunk, or of the whole clip."""
    import statistics
    import time

    sampler, config = pipeline.system.sampler, pipeline.codec.config
    frames = int(sampler.first) + sampler.chunk if sampler.program.lag else sampler.frames
    seconds = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        pipeline.generate(config.pixel_frames(frames), prompts=[prompts[repeat % len(prompts)]])
        seconds.append(time.perf_counter() - start)
    return {"first_frame_s": statistics.median(seconds[1:]), "first_frames": frames, "repeats": repeats}


def _reader_of_text(source: str, clip: Sequence[int]) -> Any:
    """A pipeline whose network reads captions and makes clips of the captioned world."""
    from vidar.errors import ConfigError
    from vidar.pipeline import load_pipeline

    pipeline = load_pipeline(source)
    video, model = pipeline.system.config.video, pipeline.model.config
    if model.text is None or model.actions is not None or model.classes is not None or model.image is not None:
        raise ConfigError(f"{source}: should take text and nothing else, as configs/captions/teacher.py does")
    frames = pipeline.codec.config.pixel_frames(video.frames)
    if (frames, video.height, video.width) != tuple(clip):
        raise ConfigError(
            f"{source}: makes {frames} frames of {video.height}×{video.width}, the captioned world has {clip[0]} of "
            f"{clip[1]}×{clip[2]}: give a model of such clips"
        )
    return pipeline


def _titles(sources: Sequence[str]) -> list[str]:
    """A name for each model's entry and picture: that of its directory, or of its file without the suffix."""
    import os

    from vidar.errors import ConfigError
    from vidar.weights import SUFFIX

    titles = [Path(os.path.abspath(source)).name.removesuffix(SUFFIX) for source in sources]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if twice:
        raise ConfigError(
            f"--model: several are named {', '.join(twice)}, as their results would be: rename or link one"
        )
    return titles


def _loaded(source: str, form: Any) -> Any:
    """A pipeline whose network can continue clips of a form under their actions."""
    from vidar.errors import ConfigError
    from vidar.pipeline import load_pipeline

    pipeline = load_pipeline(source)
    system, model = pipeline.system, pipeline.model.config
    form.check(source, (system.config.video.height, system.config.video.width), model)
    if model.actions is None:
        raise ConfigError(f"{source}: takes no actions, which are what {form.clips} is about")
    if not system.sampler.program.lag:
        raise ConfigError(f"{source}: makes whole clips at once and cannot go on from a frame: give a causal student")
    return pipeline
