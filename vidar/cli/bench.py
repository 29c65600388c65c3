"""`vidar bench`: measures streaming or training, or counts what it costs without running it."""

import argparse
from pathlib import Path
from typing import Any

_DEVICES = ("H100", "H200", "B200", "A100", "RTX 4090", "TPU v5e", "TPU v5p", "TPU v6e")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "bench",
        choices=("stream", "train", "peers"),
        help="ticks of a stream, teacher-forcing steps, or a network beside diffusers' (extra parity)",
    )
    parser.add_argument("--network", choices=("transformer", "decoder"), default="transformer", help="with peers")
    parser.add_argument("--preset", default="tiny", metavar="NAME", help="tiny, small, nfd_310m, wan_1_3b or wan_14b")
    parser.add_argument("--ticks", type=int, default=100, help="ticks or steps measured")
    parser.add_argument("--warmup", type=int, help="ticks or steps before them (default: enough to fill the window)")
    parser.add_argument("--window", type=int, help="latent frames a query may see (default: the preset's clip)")
    parser.add_argument("--steps", type=int, default=4, help="solver steps of a chunk")
    parser.add_argument("--commit", default="extra_pass", choices=("extra_pass", "fused", "last_step"))
    parser.add_argument("--rows", type=int, default=1, help="sessions, or clips of a step")
    parser.add_argument("--backend", default="xla", choices=("xla", "cudnn", "splash"), help="attention")
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--height", type=int, help="pixels (default: the preset's)")
    parser.add_argument("--width", type=int, help="pixels (default: the preset's)")
    parser.add_argument("--decoder", action="store_true", help="decode to pixels on the host, where the preset can")
    parser.add_argument("--remat", action="store_true", help="recompute each block in the backward pass (train)")
    parser.add_argument("--mesh", default="", metavar="AXES", help="such as data=2,fsdp=4 (default: one device)")
    parser.add_argument("--lower-only", action="store_true", help="count FLOPs, bytes and rooflines; run nothing")
    parser.add_argument("--topology", metavar="NAME", help="with --lower-only: compile for TPUs, such as v5e:2x4")
    parser.add_argument("--results", type=Path, metavar="DIR", help="also merge the record into DIR/<device>.json")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, or counts."""
    import json

    import jax

    from vidar.benchmark import report, stream, train
    from vidar.benchmark.workload import Workload
    from vidar.config import to_dict
    from vidar.devices import enable_compilation_cache
    from vidar.errors import ConfigError, make_directory
    from vidar.sharding import make_mesh

    if options.bench == "peers":
        return _peers(options)
    if options.topology and not options.lower_only:
        raise ConfigError("--topology compiles for devices that are not there: add --lower-only")
    if (options.height is None) != (options.width is None):
        raise ConfigError("--height and --width go together")
    workload = Workload(
        bench=options.bench,
        name=options.preset,
        window=options.window,
        steps=options.steps,
        commit=options.commit,
        rows=options.rows,
        backend=options.backend,
        precision=options.precision,
        pixels=None if options.height is None else (options.height, options.width),
        decoder=options.decoder,
        remat=options.remat,
    )
    axes = mesh_of(options.mesh)
    if options.lower_only:
        return _lower(workload, axes, options)
    if options.results:
        make_directory(options.results)
    enable_compilation_cache()
    mesh = make_mesh(axes, jax.devices() if options.mesh else jax.devices()[:1])
    measure = stream.measure if options.bench == "stream" else train.measure
    record = measure(workload, mesh, options.ticks, options.warmup)
    print(report.table([record]))
    print(json.dumps(to_dict(record)))
    if options.results:
        for path in report.merge([record], options.results):
            print(f"merged into {path}")
    return 0


def _peers(options: argparse.Namespace) -> int:
    """One network beside diffusers'."""
    from vidar.benchmark import peers

    comparison = peers.NETWORKS[options.network](options.ticks)
    print(peers.table([comparison]))
    if options.results:
        print(f"merged into {peers.merge(comparison, options.results)}")
    return 0


def mesh_of(text: str) -> Any:
    """Parses mesh sizes such as `data=2,fsdp=-1`.

    Args:
        text: Axis sizes, comma-separated; empty for one device.

    Returns:
        A `MeshConfig`.

    Raises:
        ConfigError: It does not read like that.
    """
    from vidar.errors import ConfigError
    from vidar.sharding import AXES, MeshConfig

    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.removeprefix("-").isdecimal():
            raise ConfigError(
                f"--mesh {text}: {part!r} is not an axis and a size, such as fsdp=4; axes: {', '.join(AXES)}"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def _lower(workload: Any, axes: Any, options: argparse.Namespace) -> int:
    """Counts, and compiles for a topology where one is named."""
    from vidar.benchmark import lowering, report
    from vidar.benchmark.workload import describe
    from vidar.errors import ConfigError, make_directory

    if options.results and not options.topology:
        raise ConfigError("--results stores figures of a device: measure without --lower-only, or name a --topology")
    if options.results:
        make_directory(options.results)
    mesh = None
    if options.topology:
        mesh = lowering.topology_mesh(options.topology, axes)
        workload.check_mesh(mesh)
    _print_counts(workload, lowering.lowered_flops(workload))
    if mesh is not None:
        compiled = lowering.compile_for(workload, mesh)
        print(lowering.described(compiled, options.topology))
        if options.results:
            report.merge([describe(workload, mesh, 0, None, None)], options.results)
    return 0


def _print_counts(workload: Any, lowered: float) -> None:
    """Prints FLOPs, bytes and rooflines."""
    from vidar.devices import peak
    from vidar.models.flops import roofline_seconds

    counted = workload.counted
    unit = "tick" if workload.bench == "stream" else "step"
    parts = ("linear", "attention", "cross_attention", "ends")
    split = ", ".join(f"{name.replace('_', '-')} {getattr(counted, name) / 1e12:.4g}" for name in parts)
    size = "×".join(map(str, workload.resolution))
    print(f"{workload.bench} {workload.name}, {size}, {workload.rows} × window {workload.seen}, {workload.kind}")
    print(f"counted   {counted.total / 1e12:.4g} TFLOP a {unit} ({split}) and {workload.moved / 1e9:.4g} GB")
    print(
        f"lowered   {lowered / 1e12:.4g} TFLOP (one layer of one row, dense attention, × layers × rows × passes, and "
        f"the ends): {100 * (lowered / counted.total - 1):+.2f} % to the counted"
    )
    print("roofline, one device, bf16:")
    for name in _DEVICES:
        limits = peak(name)
        if limits is not None:
            seconds = roofline_seconds(counted.total, workload.moved, limits)
            print(f"  {name:8s} {1e3 * seconds:10.4g} ms   {workload.pixel_frames / seconds:10.4g} frames/s")
