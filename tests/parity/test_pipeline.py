"""Whole pipelines against diffusers', from a prompt to pixels, on one folder of tiny networks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.prompts import reference
from tests.published import make_folder
from vidar.interop.wan import dit_template
from vidar.models.quirks import Quirks
from vidar.pipeline import Choices, load_pipeline
from vidar.sampling.noise import Purpose, frame_noise, session_keys

pytestmark = pytest.mark.parity

STEPS = 4
CHOICES = Choices(height=32, width=48, frames=9, steps=STEPS, precision="float32")
PROMPT, NEGATIVE = "A red fox &amp; two dogs  walk", "blurry, low quality"


def quirky(pipeline):
    """The pipeline with a network that is told whole times, as diffusers tells it."""
    template = dit_template(replace(pipeline.model.config, quirks=Quirks(whole_times=True)))
    model = jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(pipeline.model))
    return replace(pipeline, model=model)


def ours(folder, **call):
    pipeline = quirky(load_pipeline(folder, CHOICES))
    return pipeline.generate(prompts=[PROMPT], negative=NEGATIVE, seed=7, **call), pipeline


def noise(latent):
    """The noise that the pipeline starts from, `[1, c, f, h, w]`."""
    import torch

    frames = jnp.arange(3, dtype=jnp.int32)[None]
    drawn = frame_noise(session_keys(7, 1), Purpose.INITIAL, frames, jnp.zeros((3,), jnp.int32), latent)
    return torch.from_numpy(np.array(drawn)).permute(0, 4, 1, 2, 3)


def parts(folder):
    """diffusers' and transformers' networks, and a scheduler on vidar's grid."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    grid = np.linspace(0.999, 0, STEPS + 1)[:-1]
    plain = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, device=None: plain(sigmas=grid, device=device)
    return dict(
        tokenizer=reference(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae").eval(),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer").eval(),
        scheduler=scheduler,
    )


def assert_same(video, theirs):
    theirs = np.asarray(theirs) * 255.0
    difference = np.abs(video.astype(np.float64) - theirs)
    assert np.std(theirs) > 5
    assert difference.max() < 1.5, difference.max()


def run(pipeline, **call):
    settings = dict(height=32, width=48, num_frames=9, num_inference_steps=STEPS, guidance_scale=5.0, output_type="np")
    settings |= dict(prompt=PROMPT, negative_prompt=NEGATIVE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**settings, **call).frames


def test_text_to_video_is_that_of_diffusers(tmp_path):
    from diffusers import WanPipeline

    folder = make_folder(tmp_path / "model")
    video, _ = ours(folder)
    assert_same(video, run(WanPipeline(**parts(folder)), latents=noise((4, 6, 16))))


def test_image_to_video_is_that_of_diffusers(tmp_path):
    """The features of the image are vidar's: diffusers crops the image for them, where Wan stretches it."""
    import torch
    from diffusers import WanImageToVideoPipeline
    from PIL import Image

    folder = make_folder(tmp_path / "model", image=True)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    video, pipeline = ours(folder, image=image)
    theirs = WanImageToVideoPipeline(**parts(folder), image_encoder=None, image_processor=None)
    theirs.check_inputs = lambda *arguments, **named: None  # refuses an image beside its features
    features = torch.from_numpy(np.array(pipeline.image(image)))
    call = dict(image=Image.fromarray(image[0]), image_embeds=features, latents=noise((4, 6, 16)))
    assert_same(video, run(theirs, **call))
