"""Times vidar's networks beside diffusers' with the same weights and inputs, in one run on one machine.

PyTorch eager, PyTorch compiled and vidar take turns, so that whatever else the machine does hits all of them. Before
anything is timed, their outputs are compared. Needs the `parity` extra. This room must not know command lines.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vidar.attention import kernels
from vidar.attention.visibility import Bidirectional, chunk_layout
from vidar.config import build, to_dict
from vidar.errors import ConfigError, DataError, make_directory
from vidar.evaluation.writing import replaced
from vidar.interop import tables, wan
from vidar.interop.sources import Stored
from vidar.models.codecs.wan_vae import Stream, Up, WanVAE, WanVAEConfig
from vidar.models.dit import DiTConfig, TextConfig
from vidar.models.frames import Conditions, Frames
from vidar.models.layers import Precision, product

FRAMES, HEIGHT, WIDTH = 3, 60, 104
LAYERS = 4
TOLERANCE = 1e-3  # largest difference over the largest value


@dataclass(frozen=True)
class Comparison:
    """Times of one network in one run.

    Attributes:
        network: What was run, and at what size.
        device: Kind of device.
        precision: Type of the matrix products.
        difference: Largest difference of the outputs over the largest value.
        milliseconds: Median time by implementation.
        ratio: Time of the fastest other implementation over vidar's; above 1 vidar is faster.
        costs: Milliseconds of vidar's largest parts, each run alone.
        software: Versions.
    """

    network: str
    device: str
    precision: str
    difference: float
    milliseconds: Mapping[str, float]
    ratio: float
    costs: Mapping[str, float]
    software: str


def transformer(rounds: int) -> Comparison:
    """One forward of a transformer of Wan 1.3B's width with four layers, 3 frames of 30×52 tokens, fp32.

    Args:
        rounds: Runs of each implementation, at least 1.

    Returns:
        The comparison.

    Raises:
        ConfigError: PyTorch or diffusers is missing, or outputs differ.
    """
    torch, diffusers = _peers()
    config = DiTConfig(
        width=1536, mlp=8960, heads=12, layers=LAYERS, channels=16, patch=2, text=TextConfig(),
        precision=Precision("float32", "float32"),
    )  # fmt: skip
    settings = {name: value for name, value in wan.dit_settings(config).items() if not name.startswith("_")}
    theirs = diffusers.WanTransformer3DModel(**settings).eval()
    ours = _same_weights(torch, theirs, wan.dit_template(config), wan.dit_table(config))
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(1, FRAMES, HEIGHT, WIDTH, 16)).astype(np.float32)
    text = rng.normal(size=(1, 512, 4096)).astype(np.float32)
    frames = Frames(jnp.asarray(latents), jnp.full((1, FRAMES), 0.5), chunk_layout(FRAMES, FRAMES))
    forward = jax.jit(
        lambda model, frames, text: model((frames,), Conditions(text=text), visibility=Bidirectional()).predictions[0]
    )
    states = torch.from_numpy(latents).permute(0, 4, 1, 2, 3)
    told, prompt = torch.tensor([500.0]), torch.from_numpy(text)

    def run(model: Any) -> np.ndarray:
        return model(states, told, prompt).sample.permute(0, 2, 3, 4, 1).numpy()

    given = jnp.asarray(text)
    implementations = {
        "vidar": lambda: forward(ours, frames, given).block_until_ready(),
        "diffusers": lambda: run(theirs),
        "diffusers, torch.compile": _compiled(torch, theirs, run),
    }
    tokens = FRAMES * HEIGHT * WIDTH // 4
    what = f"Wan transformer, width 1536, {LAYERS} layers, {tokens} tokens, 512 text tokens"
    costs = partial(_transformer_costs, config, tokens)
    return _compare(what, implementations, rounds, costs, _versions(torch, diffusers))


def decoder(rounds: int) -> Comparison:
    """The VAE's decoder on one chunk: 3 latent frames of 15×26, the first of a clip, fp32.

    Args:
        rounds: Runs of each implementation, at least 1.

    Returns:
        The comparison.

    Raises:
        ConfigError: PyTorch or diffusers is missing, or outputs differ.
    """
    torch, diffusers = _peers()
    config = WanVAEConfig()
    theirs = diffusers.AutoencoderKLWan().eval()
    ours = _same_weights(torch, theirs, wan.vae_template(config), wan.vae_table(config))
    latents = np.random.default_rng(0).normal(size=(1, FRAMES, HEIGHT // 4, WIDTH // 4, 16)).astype(np.float32)
    decode = jax.jit(lambda codec, latents: codec.decode_floats(latents))
    mean, deviation = (np.asarray(values, np.float32) for values in (config.mean, config.deviation))
    scaled = torch.from_numpy(latents * deviation + mean).permute(0, 4, 1, 2, 3)

    def run(model: Any) -> np.ndarray:
        return model.decode(scaled).sample.permute(0, 2, 3, 4, 1).numpy()

    given = jnp.asarray(latents)
    implementations = {
        "vidar": lambda: decode(ours, given).block_until_ready(),
        "diffusers": lambda: run(theirs),
        "diffusers, torch.compile": _compiled(torch, theirs, run, "decoder"),
    }
    what = f"Wan VAE decoder, {FRAMES} latent frames, {1 + 4 * (FRAMES - 1)} pixel frames of 120×208"
    return _compare(what, implementations, rounds, partial(_decoder_costs, ours), _versions(torch, diffusers))


def table(comparisons: Sequence[Comparison]) -> str:
    """Formats comparisons for people: Markdown, with the largest parts of vidar's time."""
    lines = []
    for one in comparisons:
        times = ", ".join(f"{name} {milliseconds:.0f} ms" for name, milliseconds in one.milliseconds.items())
        costs = ", ".join(f"{name} {milliseconds:.0f} ms" for name, milliseconds in one.costs.items())
        lines.append(f"{one.network}, {one.precision}, {one.device}: {times}; ratio {one.ratio:.2f}")
        lines.append(f"  of vidar's: {costs} ({one.software}; outputs differ by {one.difference:.1e})")
    return "\n".join(lines)


def merge(comparison: Comparison, directory: str | Path) -> Path:
    """Writes a comparison into `peers.json`, in place of an older one of the same network, device and precision.

    Args:
        comparison: The new one.
        directory: Directory of the results, such as `tests/benchmarks/results`.

    Returns:
        The file.

    Raises:
        DataError: The file that is already there cannot be read.
    """
    path = Path(directory) / "peers.json"
    known = {}
    if path.exists():
        try:
            known = {
                _conditions(one): one for one in (build(Comparison, entry) for entry in json.loads(path.read_text()))
            }
        except (OSError, ValueError, ConfigError) as error:
            raise DataError(f"{path}: not a file of comparisons ({error}); move it away or measure again") from error
    known[_conditions(comparison)] = comparison
    make_directory(path.parent)
    with replaced(path) as unfinished:
        unfinished.write_text(json.dumps([to_dict(known[key]) for key in sorted(known)], indent=2) + "\n")
    return path


def _conditions(comparison: Comparison) -> tuple[str, str, str]:
    return comparison.network, comparison.device, comparison.precision


NETWORKS: Mapping[str, Callable[[int], Comparison]] = {"transformer": transformer, "decoder": decoder}


def _peers() -> tuple[Any, Any]:
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise ConfigError(f"comparing needs {error.name}: pip install -e '.[parity]'") from error
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    return torch, diffusers


def _same_weights(torch: Any, theirs: Any, template: Any, table: Any) -> Any:
    """Draws weights that keep activations alive, and loads them into vidar's network, too."""
    for name, parameter in theirs.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith(("weight", "gamma")) else 0.0
        spread = 0.1 if parameter.ndim < 2 else float(np.prod(parameter.shape[1:])) ** -0.5
        parameter.copy_(centre + spread * torch.randn(parameter.shape) * (0.1 if centre else 1.0))
    arrays = {name: parameter.numpy() for name, parameter in theirs.state_dict().items()}
    tensors = {name: Stored(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}
    return tables.load(tensors, template, table, "diffusers")


def _compiled(torch: Any, model: Any, run: Callable[[Any], Any], part: str | None = None) -> Callable[[], Any]:
    """PyTorch's compiler on the network, or on a part of it that the whole is run with."""
    if part is None:
        compiled = torch.compile(model)
        return lambda: run(compiled)
    eager, compiled = getattr(model, part), torch.compile(getattr(model, part))

    def swapped() -> Any:
        setattr(model, part, compiled)
        try:
            return run(model)
        finally:
            setattr(model, part, eager)

    return swapped


def _compare(
    network: str,
    implementations: Mapping[str, Callable[[], Any]],
    rounds: int,
    costs: Callable[[], dict[str, float]],
    software: str,
) -> Comparison:
    if rounds < 1:
        raise ConfigError(f"rounds={rounds} must be at least 1")
    outputs = {name: np.asarray(run()) for name, run in implementations.items()}
    scale = float(np.abs(outputs["diffusers"]).max())
    difference = max(float(np.abs(output - outputs["diffusers"]).max()) for output in outputs.values()) / scale
    if not difference < TOLERANCE:
        raise ConfigError(
            f"{network}: outputs differ by {difference:.1e} of the largest value, so times do not compare"
        )
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(rounds):
        for name, run in implementations.items():
            seconds[name].append(_seconds(run))
    medians = {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}
    ratio = min(time for name, time in medians.items() if name != "vidar") / medians["vidar"]
    device = f"{jax.devices()[0].device_kind} ({platform.machine()})"
    return Comparison(network, device, "float32", difference, medians, ratio, costs(), software)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _median(run: Callable[[], jax.Array]) -> float:
    """Milliseconds of a compiled part, after one run."""
    run().block_until_ready()
    return 1e3 * float(np.median([_seconds(lambda: run().block_until_ready()) for _ in range(3)]))


def _transformer_costs(config: DiTConfig, tokens: int) -> dict[str, float]:
    """Its attention and its largest products, all layers."""
    pattern = kernels.Pattern(Bidirectional(), (chunk_layout(FRAMES, FRAMES),), "xla")
    heads = jnp.ones((1, tokens, config.heads, config.head_dim))
    attention = jax.jit(lambda x: kernels.attend(pattern, x, x, x, mask=None, cached=()))
    x, hidden = jnp.ones((tokens, config.width)), jnp.ones((tokens, config.mlp))
    shapes = (config.width, config.width), (config.width, config.mlp), (config.mlp, config.width)
    square, up, down = (jnp.ones(shape) for shape in shapes)
    multiply = jax.jit(product)
    return {
        "self-attention": config.layers * _median(lambda: attention(heads)),
        "products of the attentions": 6 * config.layers * _median(lambda: multiply(x, square)),
        "products of the MLP": config.layers
        * (_median(lambda: multiply(x, up)) + _median(lambda: multiply(hidden, down))),
    }


def _decoder_costs(codec: WanVAE) -> dict[str, float]:
    """Its stages from latents up, each at its resolution, all frames."""

    def run(layers: Sequence[Any], x: jax.Array, exists: jax.Array) -> tuple[jax.Array, jax.Array]:
        stream = Stream(None, exists, jnp.zeros((1,), bool))
        for layer in layers:
            x = layer(x, stream)
        return x, stream.exists

    costs, compiled = {}, jax.jit(run)
    groups = [list(codec.decoder.middle)]
    for layer in codec.decoder.layers:
        groups[-1].append(layer)
        if isinstance(layer, Up):
            groups.append([])
    x = jnp.ones((1, 1, HEIGHT // 4, WIDTH // 4, codec.config.width * codec.config.multipliers[-1]))
    exists = jnp.ones((1, 1), bool)
    for group in groups:
        name = f"stage at {x.shape[2]}×{x.shape[3]}"
        costs[name] = FRAMES * _median(lambda group=group, x=x, exists=exists: compiled(group, x, exists)[0])
        x, exists = compiled(group, x, exists)
    return costs


def _versions(torch: Any, diffusers: Any) -> str:
    threads = torch.get_num_threads()
    return f"jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}, {threads} threads"
