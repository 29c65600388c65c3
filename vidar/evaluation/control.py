"""Whether actions do what they say: turning left against turning right, by the optical flow of what is generated.

Takes a function that generates; it must not know networks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vidar.evaluation.metrics import horizontal_flow, share_interval, sign_test

Generate = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From given frames uint8 `[b, g, h, w, 3]` and actions `[b, f]` to video uint8 `[b, f, h, w, 3]`."""


@dataclass(frozen=True)
class Turning:
    """Result of the turning test.

    Attributes:
        share: Share of videos whose mean horizontal flow has the sign of its action.
        low: Lower end of the 95 % interval of the share, over starts.
        high: Upper end.
        probability: Two-sided probability, by chance, of starts that split so unevenly into those with both signs right
            and those with both wrong.
        flow_left: Mean flow of each start when turning left, pixels a frame, `[b]`; positive is content moving right.
        flow_right: The same when turning right.
        videos: The videos, left first, uint8 `[2 b, f, h, w, 3]`.
    """

    share: float
    low: float
    high: float
    probability: float
    flow_left: np.ndarray
    flow_right: np.ndarray
    videos: np.ndarray


def turning(
    generate: Generate,
    starts: np.ndarray,
    frames: int,
    left: int,
    right: int,
    shuffle: np.random.Generator | None = None,
) -> Turning:
    """Generates each start twice, turning left and turning right, and measures which way the picture moves.

    Args:
        generate: Continues given frames under actions; equal for both turns but for the actions.
        starts: Given frames, uint8 `[b, g, h, w, 3]`.
        frames: Frames of each video, given ones included.
        left: Number of the action that turns left.
        right: Number of the action that turns right.
        shuffle: Shuffles which video gets which action while the expectation stays, as a control; None does not.

    Returns:
        The result.
    """
    count, given = starts.shape[:2]
    action = np.repeat(np.asarray([left, right], np.int32), count)
    if shuffle is not None:
        action = shuffle.permutation(action)
    actions = np.repeat(action[:, None], frames, axis=1)
    actions[:, :given] = 0
    videos = generate(np.concatenate([starts, starts]), actions)
    flow = horizontal_flow(videos[:, given - 1 : -1], videos[:, given:])
    mean = flow.mean(axis=1)
    hits = np.stack([mean[:count] > 0, mean[count:] < 0])
    share = float(hits.mean())
    # Both turns of a start may succeed or fail together, so that starts are counted; one of each is a tie.
    right = int(hits.all(axis=0).sum())
    probability = sign_test(right, right + int((~hits).all(axis=0).sum()))
    return Turning(share, *share_interval(share, count), probability, mean[:count], mean[count:], videos)
