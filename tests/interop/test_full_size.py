"""A checkpoint of Wan 1.3B's full size, with random weights: what loading it takes, and that its causal model runs."""

import json
import resource

import pytest

from vidar.interop.sources import Stored

GIB = 2**30
CODE = """
    import json, threading
    from dataclasses import replace
    import jax, jax.numpy as jnp, numpy as np
    from vidar.attention.cache import ContextConfig
    from vidar.attention.visibility import ChunkCausal, Window
    from vidar.interop.networks import recognise
    from vidar.interop.sources import open_tensors
    from vidar.models.frames import Conditions
    from vidar.sampling.noise import session_keys
    from vidar.sampling.rollout import Sampler
    from vidar.sampling.solvers import FewStep

    jax.config.update("jax_numpy_dtype_promotion", "standard")
    def memory():
        # Without the pages of the file itself, which are mapped and which the system may take back at any time.
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

    before, peak, done = memory(), [0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = recognise(open_tensors({path!r})).load()
    done.set()
    watcher.join()
    sampler = Sampler(
        visibility=ChunkCausal() & Window(6, 0), latent=(16, 24, 16), tokens=model.config.tokens(16, 24), frames=6,
        chunk=3, solver=FewStep(), context=ContextConfig(6),
    )
    text = jax.random.normal(jax.random.key(0), (1, 512, 4096), jnp.bfloat16)
    conditions = jax.jit(sampler.encode)(model, Conditions(text=text))
    state = sampler.init(model, session_keys(0, 1))
    state, chunk = jax.jit(sampler.tick)(model, state, conditions)
    latents = np.asarray(chunk.latents)
    print(json.dumps([
        sum(leaf.size for leaf in jax.tree.leaves(model)), 1024 * (peak[0] - before), list(latents.shape),
        bool(np.isfinite(latents).all()), float(latents.std()), int(state.cache.count[0]),
        float(jnp.std(state.cache.keys[:, :, :288].astype(jnp.float32))),
    ]))
"""


@pytest.mark.slow
def test_a_full_size_checkpoint_loads_in_little_memory_and_its_causal_model_runs_a_tick(tmp_path, run_python):
    """5 minutes and 12 GiB on 2 cores: 825 tensors, 1,418,996,800 parameters, one tick at 128×192 pixels."""
    import textwrap

    import ml_dtypes
    import numpy as np

    from tests.golden import wan as golden
    from vidar.interop.targets import save_tensors

    names = golden.unfolded(json.loads(golden.NAMES.read_text())["wan_1_3b"]["original"])
    block = np.random.default_rng(0).standard_normal(2**20, np.float32)

    def stored(shape: tuple[int, ...]) -> Stored:
        def read() -> np.ndarray:
            count = int(np.prod(shape))
            numbers = np.resize(block, count).reshape(shape)
            scale = float(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 1.0
            return (scale * numbers).astype(ml_dtypes.bfloat16)

        return Stored(shape, np.dtype(ml_dtypes.bfloat16), read)

    save_tensors(tmp_path, {name: stored(shape) for name, shape in names.items()}, stem="diffusion_pytorch_model")
    code = textwrap.dedent(CODE).replace("{path!r}", repr(str(tmp_path)))
    parameters, memory, shape, finite, spread, count, keys = json.loads(
        run_python(code, devices=1, timeout=1500).splitlines()[-1]
    )
    assert parameters == 1_418_996_800
    # The network's own arrays, the largest tensor of the source, and 2 GiB.
    assert memory < 2 * parameters + 2 * 8960 * 1536 + 2 * GIB
    assert (shape, finite, count) == ([1, 3, 16, 24, 16], True, 3)
    assert 0.1 < spread < 10
    assert keys > 0.1
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 16 * GIB
