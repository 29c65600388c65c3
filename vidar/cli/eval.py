"""`vidar eval`: measures a trained model: control by actions, or the procedural world's exact errors."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    turn = kinds.add_parser("turning", help="left against right on recorded gameplay, by optical flow")
    turn.add_argument("--model", required=True, nargs="+", help="directories of runs, or .safetensors files")
    turn.add_argument("--records", required=True, help="recording with a validation split")
    turn.add_argument("--starts", type=int, default=50)
    turn.add_argument("--given", type=int, default=2, help="given frames of each start")
    turn.add_argument("--frames", type=int, default=10, help="frames of each video, given ones included")
    turn.add_argument("--output", type=Path, required=True, help="receives turning.json and a contact sheet a model")
    turn.set_defaults(run=_turning)
    world = kinds.add_parser("world", help="position, identity and colour on the one-shape world")
    world.add_argument("--model", required=True, nargs="+")
    world.add_argument("--clips", type=int, default=32)
    world.add_argument("--frames", type=int, default=8)
    world.set_defaults(run=_world)


def _turning(options: argparse.Namespace) -> int:
    import json

    import numpy as np

    from vidar.data.pipeline import DataConfig, make_dataset
    from vidar.data.records import Episodes
    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError
    from vidar.evaluation.control import turning
    from vidar.evaluation.sheets import contact_sheet
    from vidar.system import load
    from vidar.training.experiment import generate_clips

    enable_compilation_cache()
    spec = Episodes(options.records, "validation").form.actions
    names = () if spec is None else spec.names
    if not {"turn_left", "turn_right"} <= set(names):
        raise ConfigError(
            f"{options.records}: needs actions turn_left and turn_right, has {', '.join(names) or 'none'}"
        )
    left, right = (list(names).index(name) for name in ("turn_left", "turn_right"))
    batch = next(
        iter(
            make_dataset(
                DataConfig(
                    records=options.records,
                    split="validation",
                    frames=options.given,
                    stride=37,
                    batch=options.starts,
                    shuffle=True,
                    seed=1,
                )
            )
        )
    )
    starts = batch["pixels"]
    report = {}
    for source in options.model:
        system, model = load(source)

        def generate(given: np.ndarray, actions: np.ndarray, system=system, model=model) -> np.ndarray:
            # Both turns of a start share their seed: the first half of the rows is repeated as the second.
            half = len(given) // 2
            parts = [
                generate_clips(system, model, actions[part], given[part], options.frames)
                for part in (slice(0, half), slice(half, None))
            ]
            return np.concatenate(parts)

        result = turning(generate, starts, options.frames, left, right)
        control = turning(generate, starts, options.frames, left, right, np.random.default_rng(0))
        name = Path(source).stem
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
        for row in range(4):
            rows |= {f"left {row}": result.videos[row], f"right {row}": result.videos[options.starts + row]}
        contact_sheet(rows, options.output / f"{name}.png", columns=options.frames)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "turning.json").write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _world(options: argparse.Namespace) -> int:
    from vidar.devices import enable_compilation_cache
    from vidar.evaluation.world import held_out, score, standing_still
    from vidar.system import load
    from vidar.training.experiment import generate_clips

    enable_compilation_cache()
    truth = held_out(options.clips, options.frames)
    videos = {"standing still": standing_still(truth)}
    for source in options.model:
        system, model = load(source)
        videos[str(source)] = generate_clips(system, model, truth.actions, truth.pixels[:, :1], options.frames)
    for name, video in videos.items():
        summary = score(video, truth).part(1, options.frames).summary()
        cells = "  ".join(
            f"{metric} {mean:.3f} [{low:.3f}, {high:.3f}]" for metric, (mean, low, high) in summary.items()
        )
        print(f"{name:32s} {cells}")
    return 0
