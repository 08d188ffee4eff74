"""One sitting of a training: how its rate goes, when it ends, and when its checkpoint is due."""

import math
import time
from dataclasses import dataclass, field

SAVE_AFTER = 60.0  # seconds
COOLDOWN = 0.2  # of a sitting


@dataclass
class Sitting:
    """Steps up to a number or for a time, whichever ends first.

    Args:
        steps: in all, those of earlier sittings included.
        deadline: by `time.monotonic()`.
        cooldown: the end of this sitting is the end of the training, and the rate falls to zero towards it.
    """

    steps: int
    deadline: float = math.inf
    cooldown: bool = False
    began: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    def over(self, done: int) -> bool:
        """Whether no step is to follow."""
        return done >= self.steps or time.monotonic() >= self.deadline

    def due(self) -> bool:
        """Whether a checkpoint is to be written; the next one is due some time after this."""
        now = time.monotonic()
        if due := now - self.saved >= SAVE_AFTER:
            self.saved = now
        return due

    def rate(self, step: int, peak: float, warmup: int, flat: int) -> float:
        """Warm up and hold; then fall with the root of the step, for which no end has to be known.

        Under `cooldown` hold on, and fall in proportion to what is left of the last fifth, of steps or of time.

        Args:
            step: from 0.
            peak: the highest rate.
            warmup: steps until it is reached.
            flat: the step from which it falls without `cooldown`.
        """
        if self.cooldown:
            spent = (time.monotonic() - self.began) / (self.deadline - self.began)
            fall = max(0.0, 1 - max(step / self.steps, spent)) / COOLDOWN
        else:
            fall = (flat / (step + 1)) ** 0.5
        return peak * min(1.0, (step + 1) / warmup) * min(1.0, fall)
