"""Checkpoints by name: what is asked of the hub, and what is told when it has none. No test reaches a network."""

import fnmatch
import sys
import types

import pytest

from vidar.errors import CheckpointError, ConfigError
from vidar.interop.hub import local_folder

REPOSITORY = {
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "Wan2.1_VAE.pth",
    "google/umt5-xxl/spiece.model",
    "google/umt5-xxl/tokenizer.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "tokenizer/spiece.model",
    "chunkwise/causal_forcing.pt",
    "framewise/causal_forcing.pt",
}
UNWANTED = {"README.md", "assets/video.mp4", "model.onnx", "transformer/model.msgpack", ".gitattributes"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A hub that downloads empty files; each call's repository, revision and files."""
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        files = {
            file for file in REPOSITORY | UNWANTED if any(fnmatch.fnmatch(file, wanted) for wanted in allow_patterns)
        }
        calls.append((name, revision, files))
        for file in files:
            (tmp_path / "cache" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / file).touch()
        return str(tmp_path / "cache")

    install(monkeypatch, snapshot_download)
    return calls


def install(monkeypatch, snapshot_download):
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_what_is_here_is_taken_from_here(tmp_path, asked):
    folder = tmp_path / "here" / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "x.pt").touch()
    assert local_folder("owner/name").resolve() == folder
    assert local_folder(folder / "x.pt") == folder / "x.pt"
    assert not asked


def test_repositories_are_downloaded_without_what_is_not_read(tmp_path, asked):
    assert local_folder("Wan-AI/Wan2.1-T2V-1.3B") == tmp_path / "cache"
    assert asked == [("Wan-AI/Wan2.1-T2V-1.3B", None, REPOSITORY)]


@pytest.mark.parametrize(
    ("name", "revision", "inside", "files"),
    [
        ("a/b@refs/pr/1", "refs/pr/1", "", REPOSITORY),
        ("a/b/transformer", None, "transformer", {"transformer/diffusion_pytorch_model-00001-of-00002.safetensors"}),
        ("a/b/chunkwise/causal_forcing.pt@v1", "v1", "chunkwise/causal_forcing.pt", {"chunkwise/causal_forcing.pt"}),
        ("a/b/tokenizer", None, "tokenizer", {"tokenizer/spiece.model"}),
    ],
)
def test_parts_and_revisions(tmp_path, asked, name, revision, inside, files):
    assert local_folder(name) == tmp_path / "cache" / inside
    assert asked == [("a/b", revision, files)]


def test_a_part_that_the_repository_lacks_is_told(asked):
    with pytest.raises(CheckpointError, match="a/b on the Hugging Face hub has no vae that can be read here"):
        local_folder("a/b/vae")


@pytest.mark.parametrize(
    "name", ["x", "/no/such", "./a/b", "../a/b", "a/b@", "a//b", "checkpoints/model.pt", "a/model.safetensors"]
)
def test_what_is_neither_a_path_nor_a_name_is_refused(asked, name):
    with pytest.raises(CheckpointError, match="no such file or folder; give a path, or owner/name"):
        local_folder(name)
    assert not asked


class HfHubHTTPError(OSError):
    pass


class RepositoryNotFoundError(HfHubHTTPError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(HfHubHTTPError):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (GatedRepoError("401\nClient Error"), "its owner grants access"),
        (RepositoryNotFoundError("401\nClient Error"), "no such path here and no such repository there"),
        (RevisionNotFoundError("404"), "no such revision"),
        (LocalEntryNotFoundError("An error happened\nwhile"), "the hub cannot be reached"),
        (HfHubHTTPError("500 Server Error\n\nfor url"), "500 Server Error for url"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError(""), "ValueError"),
    ],
)
def test_failures_are_one_line(monkeypatch, error, told):
    def snapshot_download(*_, **__):
        raise error

    install(monkeypatch, snapshot_download)
    with pytest.raises(CheckpointError, match=told) as raised:
        local_folder("owner/name@main")
    assert str(raised.value).startswith("owner/name@main: cannot be downloaded from the Hugging Face hub: ")
    assert "\n" not in str(raised.value)


def test_interruptions_pass(monkeypatch):
    def snapshot_download(*_, **__):
        raise KeyboardInterrupt

    install(monkeypatch, snapshot_download)
    with pytest.raises(KeyboardInterrupt):
        local_folder("owner/name")


def test_without_its_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[hub\]'"):
        local_folder("owner/name")
