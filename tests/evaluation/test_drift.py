"""Drift curves of rollouts whose drift is known, and what they leave on disk."""

import json

import numpy as np
import pytest
from PIL import Image

from vidar import ConfigError
from vidar.evaluation.drift import curve, drift, latent_rms, plot
from vidar.evaluation.sheets import contact_sheet
from vidar.evaluation.writing import replaced


@pytest.fixture
def fading():
    """Twelve videos of 20 frames that lose two grey levels a frame, from their own start."""
    rng = np.random.default_rng(0)
    start = rng.integers(100, 200, (12, 1, 1, 1, 1))
    texture = rng.integers(-20, 20, (12, 1, 8, 8, 3))
    return (start + texture - 2 * np.arange(20)[None, :, None, None, None]).astype(np.uint8)


def test_a_fading_video_drifts_in_luminance_as_it_fades(fading):
    found = drift(fading)
    assert (found.videos, found.frames) == (12, 20)
    assert set(found.curves) == {"sharpness", "luminance", "saturation", "distance_to_first"}
    luminance = found.curves["luminance"]
    assert luminance.slope.mean == pytest.approx(-2 / 255, rel=1e-4)
    # Parts of 3 frames, 17 frames apart.
    assert luminance.change.mean == pytest.approx(-34 / 255, rel=1e-4)
    assert luminance.change.low <= luminance.change.mean <= luminance.change.high < 0
    assert luminance.low[0] < luminance.mean[0] < luminance.high[0]
    assert found.curves["distance_to_first"].mean[7] == pytest.approx(14 / 255, rel=1e-4)
    assert found.curves["sharpness"].slope.mean == pytest.approx(0, abs=1e-8)


def test_truth_and_extra_metrics_have_curves_of_their_own(fading):
    error = np.broadcast_to(np.arange(20.0), (12, 20))
    found = drift(fading, truth=np.broadcast_to(fading[:, :1], fading.shape), extra={"position_error": error})
    psnr = found.curves["psnr"].mean
    assert psnr[0] == 100
    assert psnr[10] == pytest.approx(-20 * np.log10(20 / 255), rel=1e-6)
    assert found.curves["position_error"].slope.mean == pytest.approx(1)
    assert found.curves["position_error"].change.mean == pytest.approx(17)


def test_noise_without_a_trend_has_an_interval_around_zero():
    found = curve(np.random.default_rng(1).normal(size=(64, 40)))
    for interval in (found.slope, found.change):
        assert interval.low < 0 < interval.high
    trend = curve(np.random.default_rng(1).normal(size=(64, 40)) + 0.05 * np.arange(40))
    assert trend.slope.low > 0.04
    assert trend.slope.high < 0.06


def test_json_holds_the_numbers(fading):
    found = drift(fading)
    read = json.loads(found.to_json())
    assert read["videos"] == 12
    assert read["curves"]["luminance"]["mean"] == pytest.approx(found.curves["luminance"].mean)
    assert read["curves"]["luminance"]["slope"]["high"] == found.curves["luminance"].slope.high


def test_arrays_that_do_not_fit_are_refused(fading):
    with pytest.raises(ConfigError, match="frames ≥ 2"):
        drift(fading[:, :1])
    with pytest.raises(ConfigError, match="against truth"):
        drift(fading, truth=fading[:, :5])
    with pytest.raises(ConfigError, match="'position_error'"):
        drift(fading, extra={"position_error": np.zeros((12, 3))})


def test_plot_has_a_panel_for_each_metric(fading, tmp_path):
    plot({"ours": drift(fading), "again": drift(fading[:6])}, tmp_path / "new" / "drift.png")
    width, height = Image.open(tmp_path / "new" / "drift.png").size
    assert height > width > 500
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["drift.png"]


def test_contact_sheet_shows_the_pixels_at_the_right_times(tmp_path):
    red = np.zeros((9, 4, 4, 3), np.uint8)
    red[..., 0] = 20 * np.arange(9)[:, None, None]
    contact_sheet({"a": red, "a longer label": red[:3]}, tmp_path / "sheet.png", columns=3, tile=40, text="title")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 3 * 40 + 2 * 2
    # Frames are the only pixels with red and no green: first row frames 0, 4, 8; second row 0, 1, 2.
    for row, reds in enumerate([(80, 160), (20, 40)]):
        for column, value in enumerate(reds, start=1):
            shown = np.argwhere((sheet == [value, 0, 0]).all(axis=-1))
            assert shown.shape[0] == 40 * 40
            assert shown[:, 1].min() == column * 42
            assert (shown[:, 0].min() > sheet.shape[0] / 2) == bool(row)


def test_contact_sheets_of_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least one video"):
        contact_sheet({}, tmp_path / "sheet.png")
    with pytest.raises(ConfigError, match="row 'a'.*float64"):
        contact_sheet({"a": np.zeros((2, 4, 4, 3))}, tmp_path / "sheet.png")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old")

    def interrupted():
        with replaced(path) as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with replaced(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_latent_frames_stand_for_their_pixel_frames():
    latents = np.asarray([1.0, 2.0, -3.0])[None, :, None, None, None] * np.ones((2, 1, 2, 2, 4))
    np.testing.assert_allclose(latent_rms(latents, 3), [[1, 2, 3]] * 2)
    np.testing.assert_allclose(latent_rms(latents, 9), [[1, 2, 2, 2, 2, 3, 3, 3, 3]] * 2)
    for frames in (2, 4, 8):
        with pytest.raises(ConfigError, match=f"3 latent frames do not stand for {frames} pixel frames"):
            latent_rms(latents, frames)
