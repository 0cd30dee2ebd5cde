"""Learning-rate curves as plain functions of the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable

from foveate.training.recipes import TrainingSettings


def learning_rate_factor(settings: TrainingSettings, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor on `learning_rate` for optimiser step 0, 1, ..., `total_steps` - 1.

    With m = `min_lr_ratio` and p in [0, 1) the share of the steps after the warm-up that are done:

    - constant: 1
    - linear: 1 - (1 - m) p
    - cosine: m + (1 - m) (1 + cos(pi p)) / 2
    - cosine_per_epoch: m + (1 - m) (1 + cos(pi e / E)) / 2 with e = the current epoch and E = the number of epochs,
      constant within an epoch (section 3 of the DynRefer specification: 1, .905, .655, .345, .095 for five epochs)

    The warm-up multiplies by (step + 1) / warmup_steps, so that the first step already learns; without `true_warmup`
    there is none.
    """
    warmup, low = settings.warmup_steps if settings.true_warmup else 0, settings.min_lr_ratio
    epochs = math.ceil(total_steps / steps_per_epoch)

    def factor(step: int) -> float:
        done = min(max(step - warmup, 0) / max(total_steps - warmup, 1), 1.0)
        if settings.schedule == "constant":
            value = 1.0
        elif settings.schedule == "linear":
            value = 1 - (1 - low) * done
        elif settings.schedule == "cosine":
            value = low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
        else:
            value = low + (1 - low) * (1 + math.cos(math.pi * min(step // steps_per_epoch, epochs) / epochs)) / 2
        return value * min((step + 1) / warmup, 1.0) if warmup else value

    return factor
