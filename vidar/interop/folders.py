"""Folders of published models: where each network lies, in the original layout and in diffusers'."""

from dataclasses import dataclass
from pathlib import Path

from vidar.errors import CheckpointError
from vidar.interop.sources import INDEX_SUFFIX, TORCH_SUFFIXES

# Beginnings of the names of files, and names of folders, by network.
_ORIGINAL = {
    "transformer": "diffusion_pytorch_model",
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5",
    "image_encoder": "models_clip",
}
_TOKENIZERS = ("tokenizer", "google/umt5-xxl")


@dataclass(frozen=True)
class Folder:
    """Where the networks of a model lie; None for those that it lacks.

    Attributes:
        transformer: Weights of the transformer.
        vae: Weights of the VAE.
        text_encoder: Weights of the text encoder.
        tokenizer: Its tokenizer.
        image_encoder: Weights of the image encoder.
    """

    transformer: Path
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    image_encoder: Path | None

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether a folder looks like a published model's."""
        return (path / "transformer").is_dir() or any(path.glob(f"{_ORIGINAL['transformer']}*"))

    @classmethod
    def find(cls, path: str | Path) -> "Folder":
        """Finds the networks of a published model.

        Args:
            path: Its folder.

        Returns:
            Where they lie.

        Raises:
            CheckpointError: There is no such folder, or no transformer in it.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such folder of a model")
        found = {name: path / name for name in _ORIGINAL if (path / name).is_dir()}
        if "transformer" not in found:
            found = {name: file for name, start in _ORIGINAL.items() if (file := _file(path, start)) is not None}
        if "transformer" not in found:
            raise CheckpointError(
                f"{path}: no published model: it has neither a folder transformer/ nor "
                f"{_ORIGINAL['transformer']}*.safetensors"
            )
        tokenizers = [path / name for name in _TOKENIZERS if (path / name).is_dir()]
        tokenizer = tokenizers[0] if tokenizers else None
        vae, text_encoder, image_encoder = (found.get(name) for name in ("vae", "text_encoder", "image_encoder"))
        return cls(found["transformer"], vae, text_encoder, tokenizer, image_encoder)


def _file(folder: Path, start: str) -> Path | None:
    """The checkpoint whose name begins so: an index before the files that it names."""
    for suffixes in ((INDEX_SUFFIX,), (".safetensors", *TORCH_SUFFIXES)):
        files = sorted(
            file for file in folder.iterdir() if file.name.startswith(start) and file.name.endswith(suffixes)
        )
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{folder}: holds several checkpoints ({names}) and no {INDEX_SUFFIX}")
        if files:
            return files[0]
    return None
