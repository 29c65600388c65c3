"""Records gameplay of ViZDoom scenarios: small frames and the actions that made them.

A scripted player wanders: it holds each action for a while, prefers to walk, and turns away from walls that are near.
It cannot die. The room knows the game; how episodes are stored is decided in `records.py`.
"""

import contextlib
import importlib.util
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vidar.data.records import ActionSpec, EpisodeWriter, Format
from vidar.errors import ConfigError, check_range

ACTIONS = ActionSpec("discrete", ("none", "turn_left", "turn_right", "move_forward"))
SCENARIOS = ("health_gathering_supreme", "health_gathering", "my_way_home", "deathmatch")
TICKS_PER_SECOND = 35
TURN_DEGREES = 2.0  # per game tick: the engine's own turning accelerates, which a frame does not show
VALIDATION_EVERY = 10  # each tenth shard is held out

NONE, LEFT, RIGHT, FORWARD = range(4)


def record(
    output: str | Path,
    frames: int = 50_000,
    size: int = 32,
    scenario: str = SCENARIOS[0],
    frame_skip: int = 4,
    seed: int = 0,
    shard_frames: int = 2_000,
    encoding: Literal["raw", "h264"] = "raw",
) -> None:
    """Records gameplay into a directory that `records.Episodes` reads, with splits `train` and `validation`.

    Every shard is played by an engine of its own and seeded by its number. So a recording that was interrupted at any
    instant goes on where it stopped, with the same data, and asking for more frames extends a finished one.

    Args:
        output: The directory to write to.
        frames: Frames to record, validation included; rounded up to whole shards, at least two.
        size: Side of the square frames in pixels, 8 to 480; larger than 120 renders the game larger.
        scenario: One of `SCENARIOS`.
        frame_skip: Game ticks (1/35 s) from frame to frame, ≥ 1; the action is held that long.
        seed: Seed of the player and of the game.
        shard_frames: Frames of a shard.
        encoding: `raw` or `h264`, see `records.Format`.

    Raises:
        ConfigError: Unknown scenario, impossible numbers, or ViZDoom is not installed.
        DataError: The directory cannot be written or holds another recording.
    """
    from tqdm import tqdm

    _check(scenario, frames, size, frame_skip, shard_frames)
    check_range("seed", seed, least=0)
    form = Format((size, size), ACTIONS, encoding, fps=TICKS_PER_SECOND / frame_skip)
    source = {
        "game": "vizdoom",
        "scenario": scenario,
        "frame_skip": frame_skip,
        "turn_degrees": TURN_DEGREES,
        "seed": seed,
        "shard_frames": shard_frames,
    }
    writer = EpisodeWriter(Path(output).resolve(), form, source)
    shards = [
        ("train" if number % VALIDATION_EVERY else "validation", number) for number in range(-(-frames // shard_frames))
    ]
    missing = [shard for shard in shards if not writer.frames(*shard)]
    total = len(shards) * shard_frames
    with tqdm(total=total, initial=total - len(missing) * shard_frames, unit="frame", desc=scenario) as progress:
        for split, number in missing:
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
            episodes = _play(scenario, size, frame_skip, shard_frames, rng, progress.update)
            writer.write_shard(split, number, episodes)
    writer.finish()


def _check(scenario: str, frames: int, size: int, frame_skip: int, shard_frames: int) -> None:
    if scenario not in SCENARIOS:
        raise ConfigError(f"scenario: {scenario!r} is unknown; known are {', '.join(SCENARIOS)}")
    if not 8 <= size <= 480:
        raise ConfigError(f"size: {size} pixels; give 8 to 480")
    if frame_skip < 1 or shard_frames < 1:
        raise ConfigError(f"frame_skip={frame_skip} and shard_frames={shard_frames} must be at least 1")
    if frames <= shard_frames:
        raise ConfigError(
            f"frames: {frames} fill one shard of {shard_frames}, which leaves nothing to train on beside the "
            f"validation split; give more than {shard_frames}, or a smaller shard_frames"
        )
    if importlib.util.find_spec("vizdoom") is None:
        raise ConfigError("recording needs ViZDoom: pip install -e '.[doom]'")


def _play(
    scenario: str,
    size: int,
    frame_skip: int,
    frames: int,
    rng: np.random.Generator,
    progress: Callable[[int], Any],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Plays episodes until they hold exactly `frames` frames; the last one is cut."""
    with _engine(scenario, size, int(rng.integers(2**31))) as game:
        remaining = frames
        while remaining:
            game.set_seed(int(rng.integers(2**31)))
            game.new_episode()
            game.send_game_command("iddqd")  # the acid floors of health_gathering would end episodes early
            player = _Wanderer(rng)
            pictures, actions = [], [NONE]
            while remaining > len(pictures) and not game.is_episode_finished():
                state = game.get_state()
                pictures.append(_shrink(state.screen_buffer, size))
                action = player.act(state.depth_buffer)
                game.make_action(_buttons(action), frame_skip)
                actions.append(action)
            remaining -= len(pictures)
            progress(len(pictures))
            yield np.stack(pictures), np.asarray(actions[: len(pictures)], np.int32)


@contextlib.contextmanager
def _engine(scenario: str, size: int, seed: int) -> Iterator[Any]:
    import vizdoom

    game = vizdoom.DoomGame()
    game.load_config(str(Path(vizdoom.scenarios_path) / f"{scenario}.cfg"))
    small = size <= 120
    game.set_screen_resolution(getattr(vizdoom.ScreenResolution, "RES_160X120" if small else "RES_640X480"))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    for overlay in ("hud", "weapon", "crosshair", "messages", "decals", "particles", "screen_flashes"):
        getattr(game, f"set_render_{overlay}")(False)
    game.set_available_buttons([vizdoom.Button.TURN_LEFT_RIGHT_DELTA, vizdoom.Button.MOVE_FORWARD])
    game.set_available_game_variables([])
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_seed(seed)
    # The engine leaves its settings and a folder where it starts.
    with tempfile.TemporaryDirectory() as folder:
        game.set_doom_config_path(str(Path(folder) / "engine.ini"))
        if sys.platform == "linux":
            game.set_vizdoom_path(str(_mortal(Path(vizdoom.scenarios_path).parent / "vizdoom", Path(folder))))
        with contextlib.chdir(folder):
            game.init()
        try:
            yield game
        finally:
            game.close()


def _mortal(engine: Path, folder: Path) -> Path:
    """A program that starts the engine so that it dies with this process, even if this process is killed."""
    die_with_parent = f"ctypes.CDLL(None).prctl(1, 9); os.getppid() == {os.getpid()} or sys.exit()"
    code = f"import ctypes, os, sys; {die_with_parent}; os.execv({str(engine)!r}, [{str(engine)!r}, *sys.argv[1:]])"
    program = folder / "engine"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o700)
    return program


class _Wanderer:
    """Holds random actions for random times, mostly walking, and turns to the open side when a wall is near."""

    NEAR = 6  # in the depth buffer's units, about a quarter of a small room
    PROBABILITIES = (0.08, 0.2, 0.2, 0.52)

    def __init__(self, rng: np.random.Generator):
        self._rng = rng
        self._action = NONE
        self._hold = 0

    def act(self, depth_hw: np.ndarray) -> int:
        """The next action, given the distances that the player sees."""
        height, width = depth_hw.shape
        horizon = depth_hw[height // 3 : 2 * height // 3].astype(np.float32)
        third = width // 3
        blocked = horizon[:, third : width - third].min() < self.NEAR
        if blocked and (self._hold <= 0 or self._action == FORWARD):
            left_is_open = horizon[:, :third].mean() > horizon[:, width - third :].mean()
            self._action, self._hold = LEFT if left_is_open else RIGHT, int(self._rng.integers(4, 12))
        elif self._hold <= 0:
            self._action = int(self._rng.choice(4, p=self.PROBABILITIES))
            self._hold = int(self._rng.integers(2, 10))
        self._hold -= 1
        return self._action


def _buttons(action: int) -> list[float]:
    return [TURN_DEGREES * ((action == RIGHT) - (action == LEFT)), float(action == FORWARD)]


def _shrink(picture_hwc: np.ndarray, size: int) -> np.ndarray:
    """Averages areas of a picture into `size` × `size` pixels; the whole field of view is kept."""
    rows, columns = (_areas(length, size) for length in picture_hwc.shape[:2])
    wide = np.tensordot(rows, picture_hwc.astype(np.float32), axes=(1, 0))
    return np.round(np.einsum("hwc,xw->hxc", wide, columns, optimize=True)).astype(np.uint8)


def _areas(length: int, size: int) -> np.ndarray:
    """float32 `[size, length]`: how much of each old pixel lies in each new one; rows sum to 1."""
    edges = np.linspace(0, length, size + 1)
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(overlap, 0, None) * (size / length)).astype(np.float32)
