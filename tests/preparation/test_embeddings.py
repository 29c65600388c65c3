"""Text states on disk: equal to those computed directly, resumable, shared by processes, checked when read."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.conftest import subprocess_environment
from tests.golden import prompts as golden
from vidar.errors import ConfigError, DataError
from vidar.models.layers import Precision
from vidar.models.umt5 import UMT5, UMT5Config
from vidar.preparation import embeddings as module
from vidar.preparation.embeddings import EmbeddingCache, Embeddings, TextEncoder
from vidar.preparation.tokenizer import Tokenizer

pytest.importorskip("ftfy")
LENGTH = 12


class Letters:
    """A tokenizer of letters that notes what it was asked."""

    def __init__(self, vocabulary=30):
        self.vocabulary = vocabulary
        self.asked = []

    def check_vocabulary(self, size):
        if size != self.vocabulary:
            raise ConfigError(f"{self.vocabulary} is not {size}")

    def __call__(self, prompts, length):
        self.asked.append(list(prompts))
        token_bs = np.zeros((len(prompts), length), np.int32)
        length_b = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            tokens = [*(ord(letter) % 26 + 2 for letter in prompt.strip()[: length - 1]), 1]
            token_bs[row, : len(tokens)], length_b[row] = tokens, len(tokens)
        return token_bs, length_b


class Counting:
    """An encoder of nothing but numbers, that notes what it was asked and may fail."""

    def __init__(self, fail_after=10**9, value=1.0):
        self.asked, self.fail_after, self.value = [], fail_after, value

    def __call__(self, prompts):
        if len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked.append(list(prompts))
        states = np.zeros((len(prompts), LENGTH, 4), ml_dtypes.bfloat16)
        for row, prompt in enumerate(prompts):
            states[row, : min(len(prompt.strip()) + 1, LENGTH)] = self.value * (1 + len(prompt.strip()))
        return states

    @property
    def prompts(self):
        return [prompt for prompts in self.asked for prompt in prompts]


def network(compute="float32"):
    precision = Precision(params="float32", compute=compute)
    config = UMT5Config(width=16, layers=2, heads=2, head_dim=8, mlp=24, vocabulary=30, precision=precision)
    return UMT5(config, rngs=nnx.Rngs(0))


def direct(net, prompts):
    """Without `TextEncoder`: all prompts in one batch."""
    return np.asarray(jax.jit(lambda net, *tokens: net(*tokens))(net, *Letters()(prompts, LENGTH)))


def text_encoder(net, tokenizer: Any = None, rows=2, length=LENGTH):
    letters: Any = Letters()
    return TextEncoder(net, tokenizer or letters, length, rows)


PROMPTS = ["a cat", "", "a red fox walks", "a cat", "snow", "the sea at night"]


@pytest.mark.parametrize("rows", [2, 64])
def test_the_encoder_computes_what_the_network_does(rows):
    net = network()
    states = text_encoder(net, rows=rows)(PROMPTS)
    assert states.shape == (6, LENGTH, 16)
    np.testing.assert_allclose(states, direct(net, PROMPTS), atol=1e-5)
    assert np.abs(states[0, :6]).max() > 0.1
    assert not states[0, 6:].any()


def test_the_encoder_compiles_once_and_encodes_a_repeated_prompt_once():
    tokenizer = Letters()
    encoder = text_encoder(network(), tokenizer, length=6)
    executables: Any = module._encode
    before = executables._cache_size()
    encoder(PROMPTS)
    encoder(["one", "two", "three"])
    assert executables._cache_size() == before + 1
    assert tokenizer.asked[0] == ["a cat", "", "a red fox walks", "snow", "the sea at night"]


def test_the_encoder_refuses_another_vocabulary_and_no_prompts():
    with pytest.raises(ConfigError, match="31 is not 30"):
        text_encoder(network(), Letters(31))
    with pytest.raises(ConfigError, match="none were given"):
        text_encoder(network())([])
    with pytest.raises(ConfigError, match="a single text"):
        text_encoder(network())("a cat")


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_states_from_disk_are_those_computed(tmp_path, compute):
    encoder = text_encoder(network(compute))
    cache = EmbeddingCache(tmp_path, encoder, "tiny", shard=2)
    found = cache.states(PROMPTS)
    assert found.dtype == jnp.dtype(compute)
    # The same rows in the same batches, so the same bits.
    np.testing.assert_array_equal(found, encoder(PROMPTS))
    again = Embeddings(tmp_path, "tiny")
    assert len(again) == 5
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(again.read(prompt), found[row])


def test_from_prompts_to_states_with_a_real_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = Tokenizer(golden.FOLDER)
    net = UMT5(dataclasses.replace(network().config, vocabulary=768), rngs=nnx.Rngs(0))
    prompts = ["  A red fox&amp;amp; a cat", "</s>", "the cat walks " * 99]
    found = EmbeddingCache(tmp_path, TextEncoder(net, tokenizer, 16), "real").states(prompts)
    token_bs, length_b = tokenizer(prompts, 16)
    expected = jax.jit(lambda net, *tokens: net(*tokens))(net, token_bs, length_b)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [int(states.any(axis=1).sum()) for states in found] == length_b.tolist() == [11, 2, 16]


def test_an_identity_changes_with_whatever_changes_the_states():
    tokenizer, config = Tokenizer(golden.FOLDER), dataclasses.replace(network().config, vocabulary=704)
    net = UMT5(config, rngs=nnx.Rngs(0))
    narrow = dataclasses.replace(config, precision=Precision(params="float32", compute="bfloat16"))
    base = TextEncoder(net, tokenizer, 16)
    assert base.identity == TextEncoder(net, tokenizer, 16, rows=1).identity
    scaled = jax.tree.map(lambda leaf: leaf * jnp.asarray(1.5, leaf.dtype), net)
    others = (
        TextEncoder(net, tokenizer, 17),
        TextEncoder(UMT5(narrow, rngs=nnx.Rngs(0)), tokenizer, 16),
        TextEncoder(scaled, tokenizer, 16),
        TextEncoder(net, Tokenizer(golden.FOLDER / "spiece.model"), 16),
    )
    assert len({base.identity, *(other.identity for other in others)}) == 5


def test_duplicates_and_prompts_that_clean_alike_are_computed_once(tmp_path):
    encoder = Counting()
    cache = EmbeddingCache(tmp_path, encoder, "one", shard=3)
    found = cache.states(["a cat", "a  cat ", "fox", "a cat", "a &amp; b", "a & b"])
    assert len(encoder.prompts) == 3
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0, :6] == 6).all()
    assert not found[0, 6:].any()
    cache.states(["fox", "a\tcat"])
    assert len(encoder.prompts) == 3
    assert "fox" in cache.embeddings
    assert "dog" not in cache.embeddings


def test_only_the_rows_up_to_a_prompts_end_are_stored(tmp_path):
    EmbeddingCache(tmp_path, Counting(), "one").states(["a", "1234567", ""])
    (shard,) = tmp_path.iterdir()
    content = shard.read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == 8 * (2 + 8 + 1)


def test_interrupted_between_shards_it_goes_on_where_it_was(tmp_path):
    prompts = [f"number {index}" for index in range(10)]
    first, second = Counting(fail_after=2), Counting()
    with pytest.raises(KeyboardInterrupt):
        EmbeddingCache(tmp_path, first, "one", shard=3).states(prompts)
    seen = []
    cache = EmbeddingCache(tmp_path, second, "one", shard=3)
    states = cache.states(prompts, progress=lambda work: seen.extend(work) or work)
    assert first.prompts == prompts[:6]
    assert second.asked == seen == [prompts[6:9], prompts[9:]]
    np.testing.assert_array_equal(states, Counting()(prompts))


def test_killed_while_it_writes_it_goes_on_where_it_was(tmp_path):
    script = """
        import os, signal, sys
        from tests.preparation.test_embeddings import Counting
        from vidar.preparation import embeddings
        kept = embeddings.whole_file
        class Dying:
            def __init__(self, file): self.file = file
            def write(self, data):
                self.file.write(data[: len(data) // 2]); self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        written = []
        def whole_file(path):
            written.append(path)
            context = kept(path)
            if len(written) == 2:
                enter = context.__enter__
                class Context:
                    def __enter__(self): return Dying(enter())
                    def __exit__(self, *arguments): pass
                return Context()
            return context
        embeddings.whole_file = whole_file
        prompts = [f"number {index}" for index in range(6)]
        embeddings.EmbeddingCache(sys.argv[1], Counting(), "one", shard=2).states(prompts)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, env=subprocess_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    (part,) = tmp_path.glob("*.part")
    encoder, prompts = Counting(), [f"number {index}" for index in range(6)]
    np.testing.assert_array_equal(
        EmbeddingCache(tmp_path, encoder, "one", shard=2).states(prompts), Counting()(prompts)
    )
    assert encoder.prompts == prompts[2:]
    assert part.exists()  # it may be another process's, still at work
    os.utime(part, (0, 0))
    EmbeddingCache(tmp_path, encoder, "one")
    assert not part.exists()


def test_a_truncated_shard_is_named(tmp_path):
    EmbeddingCache(tmp_path, Counting(), "one").states(["a cat"])
    (shard,) = tmp_path.iterdir()
    whole = shard.read_bytes()
    for length in (0, 7, 60, len(whole) - 1):
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError, match=f"{shard.name}: damaged .*; delete the file and prepare") as caught:
            Embeddings(tmp_path, "one")
        assert "\n" not in str(caught.value)


def test_a_shard_with_a_changed_byte_is_named(tmp_path):
    embeddings = EmbeddingCache(tmp_path, Counting(), "one").embeddings
    EmbeddingCache(tmp_path, Counting(), "one").states(["a cat", "fox"])
    embeddings.refresh()
    (shard,) = tmp_path.iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    # The last byte belongs to one of them; the other's states are still good.
    assert _reads(embeddings, "a cat") != _reads(embeddings, "fox")
    with pytest.raises(DataError) as caught:
        np.stack([embeddings.read(prompt) for prompt in ("a cat", "fox")])
    assert str(caught.value) == f"{shard}: damaged (a checksum differs); delete the file and prepare its prompts again"


def _reads(embeddings, prompt):
    try:
        return bool(embeddings.read(prompt).any())
    except DataError:
        return False


def test_a_shard_that_vanished_is_named(tmp_path):
    cache = EmbeddingCache(tmp_path, Counting(), "one")
    cache.states(["a cat"])
    (shard,) = tmp_path.iterdir()
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}: damaged"):
        cache.embeddings.read("a cat")


def test_another_encoders_states_are_refused(tmp_path):
    EmbeddingCache(tmp_path, Counting(), "one").states(["a cat"])
    with pytest.raises(DataError, match="holds the text states of 'one', not of 'two'; choose another directory"):
        EmbeddingCache(tmp_path, Counting(), "two")
    with pytest.raises(DataError, match="'one', not of 'two'"):
        Embeddings(tmp_path, "two")


def test_another_encoder_that_writes_meanwhile_is_refused(tmp_path):
    one, two = (EmbeddingCache(tmp_path, Counting(), name) for name in ("one", "two"))
    one.states(["a cat"])
    with pytest.raises(DataError, match="'one', not of 'two'"):
        two.states(["fox"])


def test_prompts_of_another_length_are_refused(tmp_path):
    EmbeddingCache(tmp_path, Counting(), "one").states(["a cat"])
    EmbeddingCache(tmp_path / "other", lambda prompts: Counting()(prompts)[:, :8], "one").states(["fox"])
    (shard,) = (tmp_path / "other").iterdir()
    shard.rename(tmp_path / "zz.safetensors")
    with pytest.raises(DataError, match="its prompts have .* tokens, those of the other shards"):
        Embeddings(tmp_path, "one")


def test_other_safetensors_are_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"model.safetensors: no text states of schema vidar.embeddings.1; choose"):
        Embeddings(tmp_path, "one")


def test_what_was_not_prepared_is_refused(tmp_path):
    cache = EmbeddingCache(tmp_path, Counting(), "one")
    no_prompts: Any = ["a", 1]
    with pytest.raises(DataError, match="no text states of 'a cat'; prepare the embeddings first"):
        cache.embeddings.read("a cat")
    with pytest.raises(DataError, match="absent: no such directory"):
        Embeddings(tmp_path / "absent", "one")
    with pytest.raises(ConfigError, match="none were given"):
        cache.states([])
    with pytest.raises(ConfigError, match="number 1 is int"):
        cache.states(no_prompts)


def test_a_process_sees_what_another_wrote_and_does_not_compute_it_again(tmp_path):
    early, encoder = EmbeddingCache(tmp_path, slow := Counting(), "one"), Counting()
    EmbeddingCache(tmp_path, encoder, "one").states(["a cat", "fox"])
    work = []
    early.states(["a cat", "fox", "dog"], progress=lambda groups: work.extend(groups) or groups)
    assert slow.asked == work == [["dog"]]


def test_a_shard_written_during_the_work_is_not_computed_again(tmp_path):
    other = EmbeddingCache(tmp_path, Counting(), "one")
    encoder = Counting()

    def interleaved(work):
        yield work[0]
        other.states(["c", "d"])
        yield from work[1:]

    found = EmbeddingCache(tmp_path, encoder, "one", shard=2).states(["a", "b", "c", "d", "e"], progress=interleaved)
    assert encoder.prompts == ["a", "b", "e"]
    np.testing.assert_array_equal(found, Counting()(["a", "b", "c", "d", "e"]))


def fill(directory, barrier):
    cache = EmbeddingCache(directory, Counting(), "one", shard=2)
    barrier.wait(60)
    cache.states([f"number {index}" for index in range(40)])


def test_processes_that_write_at_the_same_time_do_no_harm(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    workers = [context.Process(target=fill, args=(tmp_path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    prompts = [f"number {index}" for index in range(40)]
    embeddings = Embeddings(tmp_path, "one")
    assert len(embeddings) == 40
    found = np.stack([embeddings.read(prompt) for prompt in prompts])
    np.testing.assert_array_equal(found, Counting()(prompts))
    assert not list(tmp_path.glob("*.part"))


def test_threads_and_a_copy_in_another_process_read_the_same(tmp_path):
    prompts = [f"{'long ' * (index % 3)}{index}" for index in range(30)]
    cache = EmbeddingCache(tmp_path, Counting(), "one", shard=7)
    expected = cache.states(prompts)
    embeddings = pickle.loads(pickle.dumps(cache.embeddings))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(embeddings.read, prompts * 10))
    np.testing.assert_array_equal(np.stack(found), np.concatenate([expected] * 10))


def test_states_do_not_touch_an_accelerator_when_read(tmp_path):
    cache = EmbeddingCache(tmp_path, Counting(), "one")
    cache.states(["a cat"])
    assert isinstance(cache.embeddings.read("a cat"), np.ndarray)
    assert not isinstance(cache.states(["a cat"]), jax.Array)


def test_shards_hold_as_many_prompts_as_asked(tmp_path):
    EmbeddingCache(tmp_path, Counting(), "one", shard=4).states([f"number {index}" for index in range(10)])
    sizes = []
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        sizes.append(len(header) - 1)
    assert sorted(sizes) == [2, 4, 4]
