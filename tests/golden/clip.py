"""What transformers computes with a small image encoder of seeded weights, and how the real one's tensors are named.

`python -m tests.golden.clip` (with the `parity` extra) writes the arrays and names that the default suite compares
with.
"""

import json
import re
from pathlib import Path

import numpy as np

from tests.golden.wan import weight

ARRAYS = Path(__file__).with_name("clip.npz")
NAMES = Path(__file__).with_name("clip_names.json")

HEAD, SIZE = 16, 24
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
SMALL |= dict(image_size=SIZE, patch_size=4, hidden_act="gelu")
REAL = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16)
REAL |= dict(image_size=224, patch_size=14, hidden_act="gelu")


def images(*shape: int) -> np.ndarray:
    """Images of noise, by default made larger in height and smaller in width, uint8 `[b, h, w, 3]`."""
    return np.random.default_rng(0).integers(0, 256, shape or (2, 13, 50, 3), dtype=np.uint8)


def public(name: str) -> str:
    """A tensor's name in published files, to which transformers below version 5 kept."""
    return name if name.startswith("vision_model.") else f"vision_model.{name}"


def encoder(**fields):
    """An encoder of transformers with seeded weights, the small one by default."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**SMALL | fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(public(name), tuple(parameter.shape))))
    return model


def prepared(pixels: np.ndarray, size: int, dtype: str = "float64") -> np.ndarray:
    """Images as Wan prepares them (`CLIPModel.visual` of its wan/modules/clip.py), channels last.

    Wan has fp32, in which torch also rounds where pixels lie: by default this shows what it means to compute.
    """
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(getattr(torch, dtype)) / 255 * 2 - 1
    values = torch.nn.functional.interpolate(values, size=(size, size), mode="bicubic", align_corners=False)
    values = (values * 0.5 + 0.5).permute(0, 2, 3, 1)
    mean, deviation = (torch.tensor(numbers, dtype=values.dtype) for numbers in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((values - mean) / deviation).float().numpy()


def features(model, pixels: np.ndarray) -> np.ndarray:
    """The states after its last but one block."""
    import torch

    values = torch.from_numpy(prepared(pixels, model.config.image_size)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model(values, output_hidden_states=True).hidden_states[-2].numpy()


def real_names() -> dict[str, list[int]]:
    """Names and shapes of the real encoder's tensors in transformers."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**REAL))
    return {public(name): list(value.shape) for name, value in model.state_dict().items()}


def original_names() -> dict[str, list[int]]:
    """The same in Wan's file.

    As class VisionTransformer names them in wan/modules/clip.py of github.com/Wan-Video/Wan2.1 (commit 65386b2), with
    the arguments that its clip_xlm_roberta_vit_h_14 gives.
    """
    width, mlp = 1280, 5120
    found = {"patch_embedding.weight": [width, 3, 14, 14], "cls_embedding": [1, 1, width]}
    found |= {"pos_embedding": [1, 257, width], "head": [width, 1024]}
    norms = ["pre_norm", "post_norm"]
    for block in range(32):
        start = f"transformer.{block}"
        norms += [f"{start}.norm1", f"{start}.norm2"]
        linears = {"attn.to_qkv": (3 * width, width), "attn.proj": (width, width)}
        for name, (outputs, inputs) in (linears | {"mlp.0": (mlp, width), "mlp.2": (width, mlp)}).items():
            found |= {f"{start}.{name}.weight": [outputs, inputs], f"{start}.{name}.bias": [outputs]}
    found |= {f"{norm}.{name}": [width] for norm in norms for name in ("weight", "bias")}
    return {f"visual.{name}": shape for name, shape in found.items()}


def folded(names: dict[str, list[int]]) -> dict[str, list[int]]:
    """Names with those of the 32 blocks written once, as `tests.golden.wan.unfolded` reads them."""
    found = {}
    for name, shape in names.items():
        short = re.sub(r"\.(layers|transformer)\.\d+\.", r".\1.0-31.", name)
        assert found.setdefault(short, shape) == shape
    return found


def main() -> None:
    """Writes arrays and names."""
    model, pixels = encoder(), images()
    np.savez_compressed(ARRAYS, features=features(model, pixels), prepared=prepared(pixels, SIZE))
    known = {"diffusers": folded(real_names()), "original": folded(original_names())}
    NAMES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
