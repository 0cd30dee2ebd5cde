"""Trains a recipe in the process or processes that it is started in, for test_processes.py.

    python train_in_processes.py RECIPE OUTPUT (still | moving | resume | KILL_AT)

"still" switches every dropout off, for runs whose losses are to be compared. At step KILL_AT the last process kills
itself, as `kill -9` would.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from foveate.training.recipes import load_recipe, recipe_module
from foveate.training.trainer import run


def hold_still(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name.endswith("dropout") or isinstance(module, nn.Dropout)):
                setattr(module, name, 0.0)


def kill_at(step: int, model: Any) -> None:
    forward, calls = model.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*args, **kwargs)

    model.forward = counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe_file, output, how = sys.argv[1:]
    recipe: Any = load_recipe(recipe_file)
    set_seed(recipe.seed)
    task = recipe_module(recipe.method).build(recipe)
    if how == "still":
        hold_still(task.model)
    elif how.isdecimal():
        kill_at(int(how), task.model)
    run(task, recipe.training, Path(output), recipe.seed, resume=how == "resume")
