"""Files of other projects: what is read from them, what is written, and what is refused."""

import json
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from vidar.errors import CheckpointError, ConfigError
from vidar.interop.sources import Stored, open_tensors, without_wrappers
from vidar.interop.targets import save_tensors
from vidar.interop.torch_file import read_torch_file, write_torch_file

RNG = np.random.default_rng(0)
ARRAYS = {
    "blocks.0.weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "blocks.0.half": RNG.normal(size=(5,)).astype(np.float16),
    "brain": RNG.normal(size=(2, 1, 3)).astype(ml_dtypes.bfloat16),
    "count": np.asarray(7, np.int64),
    "nothing": np.zeros((0, 3), np.float32),
    "flags": np.asarray([True, False]),
}


def stored(arrays):
    return {name: Stored(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def assert_holds(tensors, arrays=ARRAYS):
    assert list(tensors) == list(arrays)
    for name, array in arrays.items():
        assert tensors[name].shape == array.shape
        assert tensors[name].dtype == array.dtype
        found = tensors[name].read()
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def wrapped(prefix):
    return {prefix + name: array for name, array in ARRAYS.items()}


# ----------------------------------------------------------------------------------------------------------- reading


def test_safetensors_single_and_sharded(tmp_path):
    save_file({"b": ARRAYS["brain"], "a": ARRAYS["count"]}, tmp_path / "one.safetensors")
    assert_holds(dict(sorted(open_tensors(tmp_path).items())), {"a": ARRAYS["count"], "b": ARRAYS["brain"]})
    names = list(ARRAYS)
    shards = {"x-1.safetensors": names[:2], "x-2.safetensors": names[2:]}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard, held in shards.items():
        save_file({name: ARRAYS[name] for name in held}, folder / shard)
    where = {name: shard for shard, held in shards.items() for name in held}
    index = folder / "x.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_holds(open_tensors(folder))
    index.write_text(json.dumps({"weight_map": where | {"more": "x-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"more is not in x-2.safetensors"):
        open_tensors(index)
    (folder / "x-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names x-2.safetensors, which .* lacks"):
        open_tensors(index)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_tensors(index)


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model._fsdp_wrapped_module.", "module.model._orig_mod."])
def test_networks_of_a_pytorch_file_lose_their_wrappers(tmp_path, prefix):
    other = {name: array + array for name, array in ARRAYS.items() if array.dtype != bool}
    path = tmp_path / "x.pt"
    write_torch_file(path, {"generator_ema": stored(other), "generator": stored(wrapped(prefix)), "critic": stored({})})
    assert_holds(open_tensors(path))
    assert_holds(open_tensors(path, "generator_ema"), other)
    with pytest.raises(CheckpointError, match="holds no network 'ema'; it has generator_ema, generator"):
        open_tensors(path, "ema")


def test_names_that_would_collide_are_refused():
    with pytest.raises(CheckpointError, match="same name"):
        without_wrappers(stored({"a._orig_mod.b": ARRAYS["count"], "a.b": ARRAYS["count"]}))
    assert list(without_wrappers(stored({"model.a": ARRAYS["count"], "b": ARRAYS["count"]}))) == ["model.a", "b"]


def test_storages_begin_where_they_can_be_mapped(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"model": stored(ARRAYS)})
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            if "/data/" in entry.filename:
                with archive.open(entry) as file:
                    assert file._orig_compress_start % 64 == 0


def test_large_checkpoints_are_written_in_shards(tmp_path):
    files = save_tensors(tmp_path / "x", stored(ARRAYS), stem="part", shard=60)
    assert [file.name for file in files] == [f"part-0000{n}-of-00002.safetensors" for n in (1, 2)] + [
        "part.safetensors.index.json"
    ]
    assert_holds({name: open_tensors(tmp_path / "x")[name] for name in ARRAYS})
    with pytest.raises(ConfigError, match="do not fit into one file"):
        save_tensors(tmp_path / "x.safetensors", stored(ARRAYS), shard=60)
    assert save_tensors(tmp_path / "x.safetensors", stored(ARRAYS)) == [tmp_path / "x.safetensors"]
    assert_holds({name: open_tensors(tmp_path / "x.safetensors")[name] for name in ARRAYS})
    save_tensors(tmp_path / "x.pt", stored(ARRAYS))
    assert set(read_torch_file(tmp_path / "x.pt")["generator_ema"]) == {f"model.{name}" for name in ARRAYS}
    with pytest.raises(ConfigError, match="unknown kind of file"):
        save_tensors(tmp_path / "x.gguf", stored(ARRAYS))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    write_torch_file(path, {"model": stored(ARRAYS)})

    def broken():
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left"):
        write_torch_file(path, {"model": {"x": Stored((1,), np.dtype(np.float32), broken)}})
    assert_holds(open_tensors(path))
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


# ----------------------------------------------------------------------------------------------------------- refusals


class Acting:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        import os

        return os.system, ("touch acted",)


def torch_like(path, content: bytes):
    """A file of torch.save's outward form with a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return path


@pytest.mark.parametrize("content", [Acting(), {"model": {"x": Acting()}}, np.dtype(np.float32)])
def test_pickles_that_act_are_refused_and_do_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = torch_like(tmp_path / "x.pt", pickle.dumps(content))
    with pytest.raises(CheckpointError, match="could run code"):
        open_tensors(path)
    assert not (tmp_path / "acted").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"\x80\x02}q", "cannot be read"),
        (b"\x80\x02}.", "holds no tensors by name"),
        (b"\x80\x02K\x01.", "holds no tensors by name"),
        (b"\x80\x02(X\x07\x00\x00\x00storageK\x01K\x01K\x01K\x01tQ.", "cannot be read"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.", "cannot be read"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "cannot be read"),
    ],
)
def test_broken_pickles_are_refused(tmp_path, content, said):
    with pytest.raises(CheckpointError, match=said):
        open_tensors(torch_like(tmp_path / "x.pt", content))


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    long = Stored((10,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))
    write_torch_file(path, {"model": {"x": long}})
    with pytest.raises(CheckpointError, match="storage 0 is missing or too short"):
        open_tensors(path)["x"].read()


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    write_torch_file(path, {"model": stored({"x": np.arange(1000, dtype=np.float32)})})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"x.pt: cannot be read as a PyTorch file"):
        open_tensors(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(CheckpointError, match="does not have its checksum"):
        open_tensors(path)["x"].read()
    path.write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(CheckpointError, match=r"since PyTorch 1.6"):
        read_torch_file(path)
    truncated = tmp_path / "y.safetensors"
    save_file({"x": np.zeros(100, np.float32)}, truncated)
    truncated.write_bytes(truncated.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"y.safetensors: cannot be read as safetensors"):
        open_tensors(truncated)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_tensors(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_tensors(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="unknown kind of file"):
        open_tensors(tmp_path / "x.gguf")
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": np.zeros(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="several checkpoints"):
        open_tensors(tmp_path)
    with pytest.raises(CheckpointError, match="only PyTorch files hold several networks"):
        open_tensors(tmp_path / "a.safetensors", "generator")


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, not a directory"):
        write_torch_file(tmp_path / "file" / "x.pt", {"model": stored(ARRAYS)})
