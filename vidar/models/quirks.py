"""What reference implementations do by accident, for comparing with them number by number.

Everything is off by default: the exact values are better, and what networks were trained with is too close to matter.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirks:
    """Deviations of reference code from what it means to compute.

    Attributes:
        whole_times: The network is told times cut to whole numbers, as multistep schedulers of Wan and diffusers do.
        narrow_modulation: Embeddings of time, modulation and residual sums have the type of matrix products instead of
            fp32, as in Self Forcing and CausVid.
    """

    whole_times: bool = False
    narrow_modulation: bool = False
