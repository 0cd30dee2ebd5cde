"""Trains a recipe in one of several processes, for test_recipe.py.

    python train_split.py RECIPE OUTPUT (whole | split) [resume]

"split" is accelerate's FSDP, as recipes/accelerate/fsdp.yaml sets it up. accelerate offers it for accelerators only, so
the processes of a CPU are passed off as some.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import set_seed

from foveate.training.recipes import load_recipe, recipe_module
from foveate.training.trainer import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe_file, output, how, *resume = sys.argv[1:]
    if how == "split":
        settings = yaml.safe_load(Path("recipes/accelerate/fsdp.yaml").read_text(encoding="utf-8"))["fsdp_config"]
        # As `accelerate launch` hands them over.
        os.environ |= {name.upper(): str(value) for name, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
        begin: Any = PartialState.__init__

        def as_accelerators(self: Any, *arguments: Any, **options: Any) -> None:
            first = not PartialState._shared_state
            begin(self, *arguments, **options)
            if first:
                self.distributed_type = DistributedType.MULTI_NPU

        PartialState.__init__ = as_accelerators
    recipe: Any = load_recipe(recipe_file)
    set_seed(recipe.seed)
    run(recipe_module(recipe.method).build(recipe), recipe.training, Path(output), recipe.seed, resume=bool(resume))
