"""Published models end to end: tiny folders of random weights, sampled by every recipe."""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from tests.published import CONFIGS, make_folder, network_tensors, transformer_config
from vidar.errors import CheckpointError, ConfigError
from vidar.interop.networks import KINDS
from vidar.interop.targets import save_tensors
from vidar.models.frames import Conditions
from vidar.pipeline import Choices, fitted, load_pipeline
from vidar.sampling.noise import session_keys
from vidar.streaming import Engine
from vidar.system import streaming_sampler

SMALL = Choices(height=32, width=48, frames=9, steps=2, precision="float32")
STUDENT = replace(SMALL, steps=None, frames=21, recipe="self_forcing")
PROMPTS = ["a red fox walks across the snow", "two dogs"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind, made once."""

    @cache
    def folder(image=False, layout="diffusers"):
        return make_folder(tmp_path_factory.mktemp("model"), image=image, layout=layout)

    return folder


def picture(rows=1, height=40, width=48):
    return np.random.default_rng(0).integers(0, 256, (rows, height, width, 3), dtype=np.uint8)


def test_text_to_video_is_text_states_sampled_and_decoded(folders):
    pipeline = load_pipeline(folders(), SMALL)
    video = pipeline.generate(prompts=PROMPTS, negative="blurry", seed=3)
    assert video.shape == (2, 9, 32, 48, 3)
    states = jnp.asarray(pipeline.text([*PROMPTS, "blurry"]))
    conditions = Conditions(text=states[:2], negative=jnp.stack([states[2]] * 2))
    sampler = pipeline.system.sampler
    assert [branch.coefficient for branch in sampler.guidance] == [5.0, -4.0]
    latents = sampler.generate(pipeline.model, session_keys(3, 2), conditions, 3)
    np.testing.assert_allclose(video.astype(int), pipeline.codec.decode(latents).astype(int), atol=1)
    assert np.std(video.astype(float)) > 5


def test_prompts_negative_prompts_guidance_and_seeds_act(folders):
    pipeline = load_pipeline(folders(), SMALL)

    def video(pipeline=pipeline, **changes):
        return pipeline.generate(**(dict(prompts=PROMPTS[:1], negative="blurry", seed=0) | changes)).astype(int)

    base = video()
    np.testing.assert_array_equal(base, video())
    unguided = load_pipeline(folders(), replace(SMALL, guidance=1.0))
    for other in (
        video(prompts=PROMPTS[1:]), video(negative="sharp"), video(seed=1), video(unguided, negative="")
    ):  # fmt: skip
        assert np.abs(base - other).max() > 2


@pytest.mark.parametrize("image", [False, True])
def test_both_layouts_give_the_same_video(folders, image):
    given = {"image": picture()} if image else {}
    one, other = (
        load_pipeline(folders(image, layout), SMALL).generate(prompts=PROMPTS[:1], **given)
        for layout in ("diffusers", "original")
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_solvers_are_chosen(folders, solver):
    pipeline = load_pipeline(folders(), replace(SMALL, solver=solver, shift=3.0))
    assert (pipeline.system.config.solver.kind, pipeline.system.config.solver.shift) == (solver, 3.0)
    assert pipeline.system.sampler.program.steps == 2


def test_a_student_runs_chunk_by_chunk_and_its_stream_is_the_clip(folders):
    pipeline = load_pipeline(folders(), STUDENT)
    video = pipeline.generate(prompts=PROMPTS[:1], seed=5)
    assert video.shape == (1, 21, 32, 48, 3)
    sampler = streaming_sampler(pipeline.system, window=6)
    engine = Engine(sampler, pipeline.codec, pipeline.model, text=pipeline.text(PROMPTS[:1]))
    engine.open(seed=5)
    beginning = engine.snapshot()
    engine.tick()
    engine.restore(beginning)
    chunks = [np.asarray(engine.tick()) for _ in range(2)]
    assert [chunk.shape[1] for chunk in chunks] == [9, 12]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1).astype(int), video.astype(int), atol=1)


def test_weights_of_a_student_take_the_place_of_the_folders(folders, tmp_path):
    path = tmp_path / "student.pt"
    save_tensors(path, network_tensors("transformer", transformer_config(False), "original", seed=" student"))
    choices = replace(STUDENT, recipe=None, weights=path, part="generator_ema")
    pipeline = load_pipeline(folders(), choices)
    assert pipeline.system.config.solver.kind == "few_step"
    own = load_pipeline(folders(), STUDENT)
    assert float(jnp.max(jnp.abs(pipeline.model.head.kernel[...] - own.model.head.kernel[...]))) > 0.01
    assert pipeline.generate(9, prompts=PROMPTS[:1]).shape[1] == 9


def test_image_to_video_shows_features_mask_and_latents_of_the_image(folders):
    pipeline = load_pipeline(folders(image=True), SMALL)
    given = pipeline._image(picture(), 3)
    np.testing.assert_allclose(given["image"], pipeline.image(jnp.asarray(picture())), atol=1e-5)
    mask, latents = given["latents"][..., :4], given["latents"][..., 4:]
    np.testing.assert_array_equal(mask[:, 0], np.ones((1, 4, 6, 4)))
    np.testing.assert_array_equal(mask[:, 1:], np.zeros((1, 2, 4, 6, 4)))
    first = fitted(picture()[0], 32, 48)[None, None] / np.float32(127.5) - 1
    grey = np.concatenate([first, np.zeros((1, 8, 32, 48, 3), np.float32)], axis=1)
    np.testing.assert_allclose(latents, pipeline.codec.encode_floats(jnp.asarray(grey)), atol=1e-5)
    one, other = (
        pipeline.generate(prompts=PROMPTS[:1], image=image).astype(int) for image in (picture(), 255 - picture())
    )
    assert one.shape == (1, 9, 32, 48, 3)
    assert np.abs(one - other).max() > 2


def test_a_student_goes_on_from_an_image_and_from_a_video(folders):
    """The given frames come back as the codec shows them; what follows depends on them."""
    pipeline = load_pipeline(folders(), STUDENT)
    first = picture(1, 32, 48)[:, None]
    video = pipeline.generate(13, prompts=PROMPTS[:1], given=first)
    other = pipeline.generate(13, prompts=PROMPTS[:1], given=255 - first)
    assert video.shape[1] == 13
    shown = pipeline.codec.decode(pipeline.codec.encode(jnp.asarray(first)))
    np.testing.assert_allclose(video[:, :1].astype(int), shown.astype(int), atol=1)
    assert np.abs(video[:, 5:].astype(int) - other[:, 5:].astype(int)).max() > 2
    clip = np.concatenate([first] * 9, axis=1)
    longer = pipeline.generate(21, prompts=PROMPTS[:1], given=clip)
    shown = pipeline.codec.decode(pipeline.codec.encode(jnp.asarray(clip)))
    np.testing.assert_allclose(longer[:, :9].astype(int), shown.astype(int), atol=1)


def test_the_tiny_decoder_takes_the_vaes_place(folders, tmp_path):
    save_tensors(tmp_path / "tiny.safetensors", network_tensors("tiny_vae", CONFIGS["tiny_vae"], "original"))
    pipeline = load_pipeline(folders(), replace(STUDENT, decoder=tmp_path / "tiny.safetensors"))
    assert pipeline.codec.config.kind == "taehv"
    assert pipeline.generate(9, prompts=PROMPTS[:1]).shape == (1, 9, 32, 48, 3)


def test_the_text_encoder_may_stay_in_host_memory(folders):
    pipeline = load_pipeline(folders(), replace(SMALL, text_encoder_on_cpu=True))
    there = load_pipeline(folders(), SMALL)
    leaf = pipeline.text.network.embedding[...]
    assert leaf.committed
    assert {device.platform for device in leaf.devices()} == {"cpu"}
    np.testing.assert_array_equal(pipeline.text(PROMPTS), there.text(PROMPTS))


def test_pictures_are_cut_to_shape_and_resized():
    image = picture()[0]
    assert fitted(image, 40, 48) is image
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 36:84] = image
    np.testing.assert_array_equal(fitted(wide, 40, 48), image)
    assert abs(float(fitted(wide, 20, 24).mean()) - float(image.mean())) < 3


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("image", "choices", "call", "message"),
    [
        (False, SMALL, dict(), "give a prompt"),
        (False, SMALL, dict(prompts=PROMPTS, given=picture(1, 32, 48)[:, None]), r"of \[2, 1\] clips"),
        (False, SMALL, dict(prompts=PROMPTS, image=picture(2)), "takes none"),
        (True, SMALL, dict(prompts=PROMPTS[:1]), "give one"),
        (True, SMALL, dict(prompts=PROMPTS[:1], image=picture()[..., :1]), "uint8 pixels"),
        (True, SMALL, dict(prompts=PROMPTS[:1], image=picture() / 255), "uint8 pixels"),
        (False, SMALL, dict(prompts=PROMPTS[:1], frames=10), "9 would be"),
        (False, STUDENT, dict(prompts=PROMPTS[:1], frames=17), "not 9 \\+ 12 n, .*; 21 would be"),
        (False, STUDENT, dict(prompts=PROMPTS[:1], negative="blurry"), "through guidance"),
    ],
)  # fmt: skip
def test_what_does_not_fit_gets_one_line(folders, image, choices, call, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_pipeline(folders(image=image), choices).generate(**call)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "changes", "message"),
    [
        (False, dict(chunk=3), "are for causal models"),
        (False, dict(steps=4, recipe="self_forcing"), "4 steps, which were trained"),
        (True, dict(recipe="causvid", steps=None), "cannot be causal"),
        (False, dict(height=40), "40×48 pixels: height and width must be multiples of 16"),
        (False, dict(solver="heun"), "unipc, dpm\\+\\+, euler"),
        (False, dict(recipe="sf"), "wan, self_forcing, causvid"),
        (False, dict(window=7, recipe="self_forcing", steps=None), "context.window=7"),
    ],
)
def test_impossible_choices_get_one_line(folders, image, changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_pipeline(folders(image=image), replace(SMALL, **changes))
    assert "\n" not in str(caught.value)


def test_networks_in_the_wrong_place_and_missing_ones_are_refused(folders, tmp_path):
    for name, expected in (("vae", "holds a tiny_vae"), ("transformer", "holds a vae")):
        broken = tmp_path / name
        make_folder(broken)
        (broken / name / "diffusion_pytorch_model.safetensors").unlink()
        kind = "tiny_vae" if name == "vae" else "vae"
        layout = "original" if name == "vae" else "diffusers"
        save_tensors(broken / name, network_tensors(kind, CONFIGS[kind], layout), stem=KINDS[name].stem)
        with pytest.raises(CheckpointError, match=expected):
            load_pipeline(broken, SMALL)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_pipeline(tmp_path / "nothing", SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a folder transformer/ nor"):
        load_pipeline(tmp_path / "empty", SMALL)
