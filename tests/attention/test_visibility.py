"""Who sees whom: literal truth tables, leaks, and what a real network's outputs depend on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.networks import CONFIG, LATENT, network
from vidar.attention.kernels import Pattern
from vidar.attention.visibility import (
    CLEAN,
    Bidirectional,
    ChunkCausal,
    Identity,
    KeyRange,
    TeacherForcing,
    Visibility,
    Window,
    Written,
    chunk_layout,
    frame_mask,
    leaks,
    tokens_of,
)
from vidar.models.frames import Conditions, Frames

PAIRS = (chunk_layout(6, 2),)
FIRST = (chunk_layout(7, 3, independent_first_frame=True),)
SINGLES = (chunk_layout(5, 1),)
BESIDE = (chunk_layout(4, 2, role=CLEAN), chunk_layout(4, 2))
BESIDE_SINGLES = (chunk_layout(4, 1, role=CLEAN), chunk_layout(4, 1))
BESIDE_FIRST = (
    chunk_layout(3, 2, independent_first_frame=True, role=CLEAN),
    chunk_layout(3, 2, independent_first_frame=True),
)

# One row a query frame, one letter a key frame.
TABLES = {
    "bidirectional": (Bidirectional(), PAIRS, "xxxxxx xxxxxx xxxxxx xxxxxx xxxxxx xxxxxx"),
    "causal": (ChunkCausal(), PAIRS, "xx.... xx.... xxxx.. xxxx.. xxxxxx xxxxxx"),
    "causal, first frame": (ChunkCausal(), FIRST, "x...... xxxx... xxxx... xxxx... xxxxxxx xxxxxxx xxxxxxx"),
    "window of two chunks": (ChunkCausal() & Window(4), PAIRS, "xx.... xx.... xxxx.. xxxx.. ..xxxx ..xxxx"),
    "window of one chunk": (ChunkCausal() & Window(2), PAIRS, "xx.... xx.... ..xx.. ..xx.. ....xx ....xx"),
    "window, sink": (ChunkCausal() & Window(4, 2), PAIRS, "xx.... xx.... xxxx.. xxxx.. xx..xx xx..xx"),
    # Self Forcing's eviction trace: window 4, sink 1, the fifth frame attends {1, 3, 4, 5}.
    "window, sink, single frames": (ChunkCausal() & Window(4, 1), SINGLES, "x.... xx... xxx.. xxxx. x.xxx"),
    "window, sink, first frame": (
        ChunkCausal() & Window(4, 1),
        FIRST,
        "x...... xxxx... xxxx... xxxx... x...xxx x...xxx x...xxx",
    ),
    # clean ‖ noisy: clean block i sees clean blocks ≤ i; noisy block i sees clean blocks < i and itself.
    "teacher": (
        TeacherForcing(),
        BESIDE,
        """xx...... xx...... xxxx.... xxxx....
           ....xx.. ....xx.. xx....xx xx....xx""",
    ),
    "teacher, first frame": (TeacherForcing(), BESIDE_FIRST, "x..... xxx... xxx... ...x.. x...xx x...xx"),
    "teacher, window": (
        TeacherForcing() & Window(2),
        BESIDE_SINGLES,
        """x....... xx...... .xx..... ..xx....
           ....x... x....x.. .x....x. ..x....x""",
    ),
    "teacher, window, sink": (
        TeacherForcing() & Window(3, 1),
        BESIDE_SINGLES,
        """x....... xx...... xxx..... x.xx....
           ....x... x....x.. xx....x. x.x....x""",
    ),
    "identity": (Identity(), BESIDE_FIRST, "x..... .x.... ..x... xxxxxx xxxxxx xxxxxx"),
    "identity, causal": (Identity() & ChunkCausal(), BESIDE_FIRST, "x..... .x.... ..x... x..x.. xxxxxx xxxxxx"),
    "either": (
        TeacherForcing() | Identity() & ChunkCausal(),
        BESIDE_FIRST,
        "x..... xxx... xxx... x..x.. xxxxxx xxxxxx",
    ),
}


def table(text: str) -> np.ndarray:
    return np.array([[letter == "x" for letter in row] for row in text.split()])


@pytest.mark.parametrize("name", TABLES)
def test_truth_table(name):
    visibility, layouts, text = TABLES[name]
    np.testing.assert_array_equal(Pattern(visibility, layouts).mask(), table(text))


RANGED = KeyRange((0.75, 0.5, 0.25), (4, 3, 2, 1)) & ChunkCausal()
LEVELS = (0.0, 0.25, 0.5, 0.75, 0.3, 1.0)
RANGED_TABLE = "x..... xx.... xxx... xxxx.. ...xx. ..xxxx"


def test_key_range_follows_the_level_of_the_query():
    """MAGI-1: a chunk sees the more of the past the noisier it is; a level on a bound belongs to the noisier stage."""
    tokens = tokens_of(chunk_layout(6, 1), np.asarray(LEVELS))
    np.testing.assert_array_equal(frame_mask(RANGED, tokens, tokens), table(RANGED_TABLE))
    assert RANGED.reads == {"level"}


def test_written_hides_empty_slots():
    tokens = tokens_of(chunk_layout(3, 1))
    slots = tokens_of(chunk_layout(3, 1))
    slots = type(slots)(**{**slots.__dict__, "written": np.array([True, False, True])})
    np.testing.assert_array_equal(frame_mask(Written(), tokens, slots), table("x.x x.x x.x"))
    np.testing.assert_array_equal(frame_mask(Written() & ChunkCausal(), tokens, slots), table("x.. x.. x.x"))
    assert (Written() | ChunkCausal()).reads == {"written"}


def test_layouts():
    layout = chunk_layout(7, 3, independent_first_frame=True)
    assert layout.offsets == (0, 1, 2, 3, 4, 5, 6)
    assert layout.chunks == (0, 1, 1, 1, 2, 2, 2)
    assert layout.ends == (1, 4, 4, 4, 7, 7, 7)
    assert chunk_layout(5, 2).ends == (2, 2, 4, 4, 5)


@dataclass(frozen=True)
class ContextFrame(Visibility):
    """AR-Diffusion's released pattern: one context frame sees all, and all see it."""

    def sees(self, query, key):
        return (query.frame == 0) | (key.chunk <= query.chunk)


@dataclass(frozen=True)
class LookAhead(Visibility):
    """One chunk too far."""

    def sees(self, query, key):
        return key.chunk <= query.chunk + 1


LEAKY = {
    "one chunk ahead": LookAhead(),
    "bidirectional": Bidirectional(),
    "bidirectional in a window": Bidirectional() & Window(4),
    "causal or identity": ChunkCausal() | Identity(),
    "through a context frame": ContextFrame(),
    "key range alone": KeyRange((0.5,), (2, 1)),
}
TIGHT = {
    "causal": ChunkCausal(),
    "window": ChunkCausal() & Window(4),
    "window, sink": ChunkCausal() & Window(4, 2),
    "teacher": TeacherForcing(),
    "key range": RANGED,
    "identity, causal": Identity() & ChunkCausal(),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", [*LEAKY, *TIGHT])
def test_leaks(name, first):
    layout = chunk_layout(7, 3, independent_first_frame=True) if first else chunk_layout(8, 2)
    assert leaks((LEAKY | TIGHT)[name], layout) == (name in LEAKY)


# -------------------------------------------------------------------------------------------- what outputs depend on

DEPENDENCIES = {name: (*TABLES[name][:2], None) for name in (
    "causal, first frame", "window of two chunks", "window, sink, single frames", "teacher, window, sink", "identity"
)} | {
    "key range": (RANGED, (chunk_layout(6, 1),), LEVELS),
    "through a context frame": (ContextFrame(), (chunk_layout(4, 2),), None),
}  # fmt: skip


def dependency(visibility, layouts, levels) -> np.ndarray:
    """Whether the prediction of frame i has a gradient with respect to the latents of frame j, over all streams."""
    model = network()
    counts = [layout.frames for layout in layouts]
    total = sum(counts)
    levels = jnp.full((1, total), 0.5) if levels is None else jnp.asarray(levels)[None]
    cuts = np.cumsum(counts)[:-1].tolist()
    weights = jax.random.normal(jax.random.key(1), LATENT)

    def response(latents_fhwc, frame):
        parts = zip(jnp.split(latents_fhwc[None], cuts, 1), jnp.split(levels, cuts, 1), layouts, strict=True)
        streams = tuple(Frames(*part) for part in parts)
        conditions = Conditions(actions=jnp.zeros((1, counts[0]), jnp.int32))
        out = jnp.concatenate(model(streams, conditions, visibility=visibility).predictions, axis=1)[0]
        return jnp.sum(jnp.take(out, frame, axis=0) * weights)

    latents = jax.random.normal(jax.random.key(0), (total, *LATENT))
    gradients = jax.jit(jax.vmap(jax.grad(response), (None, 0)))(latents, jnp.arange(total))
    return np.asarray(jnp.max(jnp.abs(gradients), axis=(2, 3, 4)))


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_outputs_depend_on_what_the_pattern_reaches_in_as_many_layers(name):
    """Catches every leak: exactly no gradient outside the closure, some gradient everywhere inside."""
    visibility, layouts, levels = DEPENDENCIES[name]
    found = dependency(visibility, layouts, levels)
    mask = Pattern(visibility, layouts).mask() if levels is None else table(RANGED_TABLE)
    reached = np.linalg.matrix_power(mask.astype(int), CONFIG.layers) > 0
    np.testing.assert_array_equal(found > 0, reached)
    assert found[reached].min() > 1e-9
    assert reached.all() == (name == "through a context frame")
