"""What diffusers and transformers compute with small networks of seeded weights, and how they name real ones.

`python -m tests.golden.wan` (with the `parity` extra) writes the arrays and names that the default suite compares with.
Weights and inputs follow from names and shapes alone, so that only outputs are stored.
"""

import json
import re
import zlib
from pathlib import Path

import numpy as np

ARRAYS = Path(__file__).with_name("wan.npz")
NAMES = Path(__file__).with_name("wan_names.json")

HEAD = 24
DIT = dict(num_attention_heads=2, attention_head_dim=HEAD, in_channels=16, out_channels=16, text_dim=32)
DIT |= dict(freq_dim=64, ffn_dim=96, num_layers=2)
I2V = DIT | dict(in_channels=36, image_dim=40, added_kv_proj_dim=2 * HEAD)
MEAN, DEVIATION = (0.5, -0.25, 0.0, 1.0), (1.5, 2.0, 0.5, 1.0)
TEXT = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
XXL = TEXT | dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
LENGTHS = (200, 77)
TIED = "encoder.embed_tokens.weight"  # the same array as shared.weight, which alone is written to files
VAE = dict(base_dim=8, z_dim=4, latents_mean=list(MEAN), latents_std=list(DEVIATION))
REAL = {
    "wan_1_3b": dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30),
    "wan_14b": dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40),
    "wan_14b_i2v": dict(
        num_attention_heads=40,
        attention_head_dim=128,
        ffn_dim=13824,
        num_layers=40,
        in_channels=36,
        image_dim=1280,
        added_kv_proj_dim=5120,
    ),
}


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers that follow from a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight that follows from its name in diffusers: spread such that activations neither vanish nor grow."""
    numbers = normal(name, shape)
    if "norm" in name and name.endswith(("weight", "gamma")):
        return 1 + 0.1 * numbers
    if name.endswith("bias"):
        return 0.1 * numbers
    return numbers * (np.float32(max(1, np.prod(shape[1:]))) ** -0.5 if len(shape) > 1 else np.float32(0.1))


def inputs(image: bool) -> dict[str, np.ndarray]:
    """Inputs of the transformers, channels last, times in [0, 1000]."""
    found = {
        "latents": normal("latents", (2, 3, 8, 12, 36 if image else 16)),
        "text": normal("text", (2, 512, 32)),
        "time": np.float32([300.0, 777.0]),
    }
    return found | {"image": normal("image", (2, 7, 40))} if image else found


def pixels() -> np.ndarray:
    """A clip for the VAE, uint8 `[b, 1 + 4 n, h, w, 3]`, smooth in time and space."""
    time, row, column = np.meshgrid(np.arange(13), np.arange(32), np.arange(48), indexing="ij")
    waves = [np.sin(0.2 * row + 0.3 * time), np.cos(0.15 * column - 0.4 * time), np.sin(0.1 * (row + column))]
    one = np.stack(waves, axis=-1)
    return np.round(np.stack([one, one[:, ::-1]]) * 100 + 128).astype(np.uint8)


def fill(model) -> None:
    """Gives a torch model its seeded weights."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():  # names each tied one once, by its first name
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))


def transformer(image: bool):
    """diffusers' small transformer."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**I2V if image else DIT).eval()
    fill(model)
    return model


def transformed(model, image: bool) -> np.ndarray:
    """Its output, channels last."""
    import torch

    given = {name: torch.from_numpy(array) for name, array in inputs(image).items()}
    with torch.no_grad():
        states = given["latents"].permute(0, 4, 1, 2, 3)
        output = model(states, given["time"], given["text"], given.get("image")).sample
    return output.permute(0, 2, 3, 4, 1).numpy()


def vae():
    """diffusers' small VAE."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(**VAE).eval()
    fill(model)
    return model


def encoded(model) -> np.ndarray:
    """The mean of the latents of `pixels`, channels last, of mean 0 and deviation 1."""
    import torch

    video = torch.from_numpy(pixels().astype(np.float32) / 127.5 - 1).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        mean = model.encode(video).latent_dist.mode().permute(0, 2, 3, 4, 1).numpy()
    return ((mean - np.float32(MEAN)) / np.float32(DEVIATION)).astype(np.float32)


def decoded(model, latents: np.ndarray) -> np.ndarray:
    """The frames of latents, in [-1, 1]."""
    import torch

    scaled = latents * np.float32(DEVIATION) + np.float32(MEAN)
    with torch.no_grad():
        return model.decode(torch.from_numpy(scaled).permute(0, 4, 1, 2, 3)).sample.permute(0, 2, 3, 4, 1).numpy()


def tokens() -> np.ndarray:
    """Tokens of two prompts, padded to the longer one."""
    return np.random.default_rng(0).integers(0, TEXT["vocab_size"], (2, max(LENGTHS))).astype(np.int32)


def text_encoder():
    """transformers' small UMT5."""
    from transformers import UMT5Config, UMT5EncoderModel

    model = UMT5EncoderModel(UMT5Config(**TEXT)).eval()
    fill(model)
    return model


def text_states(model) -> np.ndarray:
    """The states of `tokens`, zero where padding is."""
    import torch

    kept = np.arange(max(LENGTHS))[None] < np.asarray(LENGTHS)[:, None]
    with torch.no_grad():
        output = model(torch.from_numpy(tokens()).long(), attention_mask=torch.from_numpy(kept).long())
    return output.last_hidden_state.numpy() * kept[..., None]


def real_names() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of the real networks' tensors in diffusers."""
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        models = {name: WanTransformer3DModel(**fields) for name, fields in REAL.items()}
        models |= {"vae": AutoencoderKLWan(), "umt5": UMT5EncoderModel(UMT5Config(**XXL))}
    return {
        name: {tensor: list(value.shape) for tensor, value in model.state_dict().items() if tensor != TIED}
        for name, model in models.items()
    }


def folded(names: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names with those of numbered blocks written once, as `blocks.0-29.…`."""
    found, blocks = {}, {}
    for name, shape in names.items():
        if match := re.match(r"(blocks|encoder\.block)\.(\d+)\.(.*)", name):
            blocks.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            found[name] = shape
    for (start, rest), numbers in blocks.items():
        assert numbers == list(range(len(numbers)))
        found[f"{start}.0-{numbers[-1]}.{rest}"] = names[f"{start}.0.{rest}"]
    return found


def unfolded(names: dict[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """The inverse of `folded`."""
    found = {}
    for name, shape in names.items():
        match = re.match(r"(.*)\.0-(\d+)\.(.*)", name)
        every = [f"{match[1]}.{number}.{match[3]}" for number in range(int(match[2]) + 1)] if match else [name]
        found |= dict.fromkeys(every, tuple(shape))
    return found


def main() -> None:
    """Writes arrays and names."""
    model = vae()
    latents = encoded(model)
    arrays = {"t2v": transformed(transformer(False), False), "i2v": transformed(transformer(True), True)}
    arrays |= {"text": text_states(text_encoder())}
    arrays |= {"encoded": latents, "decoded": decoded(model, latents)[:, :, ::4, ::4]}
    np.savez_compressed(ARRAYS, **arrays)
    known = json.loads(NAMES.read_text()) if NAMES.is_file() else {}
    for name, names in real_names().items():
        known.setdefault(name, {})["diffusers"] = folded(names)
    NAMES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
