"""Metrics on images whose answer is known, and motion on shifted textures."""

import numpy as np
import pytest

from vidar.evaluation import metrics


def plain(*colour: int) -> np.ndarray:
    """A frame of one colour."""
    return np.broadcast_to(np.array(colour, np.uint8), (8, 8, 3))


def textures(count: int, smooth: float, seed: int = 0) -> np.ndarray:
    """Periodic random textures in the Fourier domain, `[count, 64, 64, 3]`, smooth over `smooth` pixels."""
    spectrum = np.fft.fft2(np.random.default_rng(seed).normal(size=(count, 64, 64, 3)), axes=(1, 2))
    frequency = np.fft.fftfreq(64)
    radius = frequency[:, None] ** 2 + frequency**2
    return spectrum * np.exp(-2 * (np.pi * smooth) ** 2 * radius)[None, :, :, None]


def view(spectrum: np.ndarray, right: float, down: float = 0.0, noise: float = 0.0, seed: int = 1) -> np.ndarray:
    """A 32 by 32 window on the textures, moved by any part of a pixel; new content replaces what leaves it."""
    frequency = np.fft.fftfreq(64)
    phase = np.exp(-2j * np.pi * (frequency[:, None] * down + frequency * right))
    image = np.fft.ifft2(spectrum * phase[None, :, :, None], axes=(1, 2)).real
    image = 128 + 40 * image / image.std() + noise * np.random.default_rng(seed).normal(size=image.shape)
    return np.clip(image[:, 16:48, 16:48], 0, 255).astype(np.uint8)


@pytest.mark.parametrize("smooth", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("noise", [0.0, 8.0])
@pytest.mark.parametrize("right", [0.3, 0.7, 1.0, 2.4, 5.0, 7.0])
def test_horizontal_flow_of_shifted_textures(smooth, noise, right):
    spectrum = textures(16, smooth)
    first = view(spectrum, 0.0, noise=noise)
    for sign in (1, -1):
        flow = metrics.horizontal_flow(first, view(spectrum, sign * right, 0.6, noise, seed=2))
        assert (np.sign(flow) == sign).all()
        np.testing.assert_allclose(flow.mean(), sign * right, atol=0.1 + 0.1 * right)
        np.testing.assert_allclose(flow, sign * right, atol=0.25 + 0.2 * right)


def test_flow_is_zero_where_nothing_moves_or_can_be_followed():
    still = view(textures(16, 1.5), 0.0)
    np.testing.assert_allclose(metrics.horizontal_flow(still, still), 0, atol=0.02)
    down = metrics.horizontal_flow(still, view(textures(16, 1.5), 0.0, down=1.5))
    assert np.abs(down).max() < 0.2
    rows = np.broadcast_to(np.arange(0, 256, 8, np.uint8)[:, None, None], (32, 32, 3))
    for untraceable in (np.full((32, 32, 3), 90, np.uint8), rows):
        assert metrics.horizontal_flow(untraceable, untraceable) == 0


def test_flow_ignores_walls_and_halves_when_half_of_the_detail_stands_still():
    spectrum = textures(16, 1.5)
    first, second = view(spectrum, 0.0), view(spectrum, 3.0)
    walls = first.copy(), second.copy()
    for image in walls:
        image[:, :12] = 60
    np.testing.assert_allclose(metrics.horizontal_flow(*walls).mean(), 3, atol=0.4)
    still = second.copy()
    still[:, 16:] = first[:, 16:]
    assert 1 < metrics.horizontal_flow(first, still).mean() < 2


def test_flow_keeps_leading_dimensions_and_does_not_depend_on_the_batch():
    spectrum = textures(130, 1.5)
    first, second = view(spectrum, 0.0), view(spectrum, 2.0)
    whole = metrics.horizontal_flow(first.reshape(65, 2, 32, 32, 3), second.reshape(65, 2, 32, 32, 3))
    assert whole.shape == (65, 2)
    assert whole[64, 1] == metrics.horizontal_flow(first[129], second[129])


def test_psnr():
    black, grey = plain(0, 0, 0), plain(51, 51, 51)
    assert metrics.psnr(black, grey) == pytest.approx(20 * np.log10(5))
    assert metrics.psnr(grey, grey) == 100
    assert metrics.psnr(np.stack([black, grey]), np.stack([grey, grey])).tolist() == pytest.approx(
        [13.979, 100], abs=1e-3
    )


def test_luminance_and_saturation():
    colours = np.stack([plain(255, 255, 255), plain(0, 255, 0), plain(0, 0, 0), plain(200, 100, 100)])
    np.testing.assert_allclose(
        metrics.luminance(colours), [1, 0.7152, 0, (0.2126 * 200 + 0.7874 * 100) / 255], rtol=1e-5
    )
    np.testing.assert_allclose(metrics.saturation(colours), [0, 1, 0, 0.5])


def test_sharpness_is_the_variance_of_the_laplacian():
    rows, columns = np.indices((9, 9))
    checkers = np.broadcast_to((((rows + columns) % 2) * 255)[..., None], (9, 9, 3)).astype(np.uint8)
    # The Laplacian of a checkerboard is ±4, with 25 of one sign and 24 of the other in the 7 by 7 interior.
    assert metrics.sharpness(checkers) == pytest.approx(16 * (1 - (1 / 49) ** 2), rel=1e-5)
    ramp = np.broadcast_to((rows * 20)[..., None], (9, 9, 3)).astype(np.uint8)
    assert metrics.sharpness(ramp) == pytest.approx(0, abs=1e-10)
    blurred = view(textures(4, 3.0), 0.0)
    assert (metrics.sharpness(blurred) < metrics.sharpness(view(textures(4, 1.0), 0.0))).all()


def test_distance_to_first():
    video = np.stack([plain(0, 0, 0), plain(51, 51, 51), plain(255, 255, 255)])
    np.testing.assert_allclose(metrics.distance_to_first(video), [0, 0.2, 1])
    np.testing.assert_allclose(metrics.distance_to_first(video[None, ::-1]), [[0, 0.8, 1]])


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        low, high = metrics.bootstrap_interval(rng.normal(5, 2, 60), resamples=300)
        covered += low < 5 < high
        assert high - low == pytest.approx(2 * 1.96 * 2 / np.sqrt(60), rel=0.45)
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_interval_of_curves_and_other_statistics():
    values = np.random.default_rng(0).normal([0, 10], [1, 0], (50, 2))
    low, high = metrics.bootstrap_interval(values)
    assert low[0] < 0.3
    assert high[0] > -0.3
    assert (low[1], high[1]) == (10, 10)
    low, high = metrics.bootstrap_interval(values[:, 0], lambda sample: np.median(sample), confidence=0.5)
    assert low < np.median(values[:, 0]) < high


def test_interval_of_a_share():
    # From the textbook's formula, and by hand: all of n gives n / (n + z²).
    assert metrics.share_interval(0.9, 50) == pytest.approx((0.7864, 0.9565), abs=1e-4)
    assert metrics.share_interval(1.0, 128) == pytest.approx((128 / (128 + 1.959964**2), 1.0))
    assert metrics.share_interval(0.0, 1) == pytest.approx((0.0, 1.959964**2 / (1 + 1.959964**2)))


def test_sign_test():
    assert metrics.sign_test(5, 10) == 1
    assert metrics.sign_test(10, 10) == pytest.approx(2 / 1024)
    assert metrics.sign_test(0, 10) == metrics.sign_test(10, 10)
    assert metrics.sign_test(45, 50) == pytest.approx(4.21e-9, rel=1e-2)
