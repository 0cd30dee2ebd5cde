"""Training in two processes that torchrun starts, on CPUs: the losses of one process, and what a kill leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.checkpoints import find_checkpoint
from foveate.data.region_file import annotation_record
from foveate.language.lm import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROGRAM = Path(__file__).with_name("train_in_processes.py")
NOUNS = ("car", "dog", "cat", "clock", "chair", "table", "tree", "house", "cup", "bus")
COLOURS = ("red", "blue", "green", "yellow", "black", "white")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole DynRefer, small, on 24 regions whose captions have equally many tokens.

    The caption loss is a mean over the tokens of a process: only then is it, averaged over processes, that of all.
    """
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    tokenizer = load_tokenizer(find_checkpoint("t5-world"))
    captions = [f"the {noun} is {colour}" for noun, colour in product(NOUNS, COLOURS)]
    lengths = [len(tokenizer(caption)["input_ids"]) for caption in captions]
    usual = Counter(lengths).most_common(1)[0][0]
    chosen = [caption for caption, length in zip(captions, lengths, strict=True) if length == usual][:24]
    assert len(chosen) == 24
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for number, caption in enumerate(chosen):
        Image.fromarray(draw.integers(0, 256, (64, 96, 3), np.uint8)).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 96, "height": 64})
        x, y = draw.integers(0, 30, 2).tolist()
        annotations.append(annotation_record(number, number, (x, y, x + 40, y + 25), caption, {}))
    (folder / "train.json").write_text(json.dumps({"dataset": {}, "images": images, "annotations": annotations}))
    (folder / "tags.txt").write_text("\n".join([*NOUNS, *COLOURS]) + "\n")
    return {
        "method": "dynrefer",
        "seed": 5,
        "data": {"format": "controlcap", "root": str(folder), "tags": str(folder / "tags.txt"), "classes": "coco"},
        "model": {
            "base_models": {"vision": "clip-world", "text": "clip-world", "language": "t5-world"},
            "image_size": 60,
            "vision_layer": -2,
            "num_query_tokens": 4,
            "qformer_width": 32,
            "qformer_layers": 2,
            "qformer_heads": 4,
            "head_size": 16,
        },
        "evaluation": {"data": {"format": "controlcap", "root": str(folder)}},
        "training": {"batch_size": 4, "max_steps": 6, "log_every": 1, "save_every": 2, "precision": "fp32"},
    }


def train(recipe: dict[str, Any], output: Path, how: str, processes: int) -> subprocess.CompletedProcess[str]:
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    source = str(Path(__file__).parents[3] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [*command, str(PROGRAM), str(file), str(output), how]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)


def history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "training.json").read_text())["history"]


def test_two_processes_have_the_losses_of_one_with_their_batches_together(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """At equal weights, so with a learning rate of 0: the gathered tensors carry no gradient (spec 3, L_rtc), and the
    first step already parts the two."""
    recipe = recipe | {"training": recipe["training"] | {"learning_rate": 0.0, "max_steps": 3, "save_every": 0}}
    whole = recipe | {"training": recipe["training"] | {"batch_size": 8}}
    split = recipe | {"training": recipe["training"] | {"shard_frozen": True}}
    for settings, name, processes in ((whole, "one", 1), (recipe, "two", 2), (split, "split", 2)):
        done = train(settings, tmp_path / name, "still", processes)
        assert done.returncode == 0, done.stderr
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    # A language model that is split between the processes is the same one.
    for together, split_one in zip(two, history(tmp_path / "split"), strict=True):
        assert split_one == pytest.approx(together, rel=1e-4)
    assert load_file(tmp_path / "split/checkpoint/model.safetensors").keys() == (
        load_file(tmp_path / "two/checkpoint/model.safetensors").keys()
    )
    assert len(one) == len(two) == 3
    assert len({entry["caption"] for entry in one}) == 3, "the batches differ, so that an equal loss says something"
    for alone, together in zip(one, two, strict=True):
        assert together["caption"] == pytest.approx(alone["caption"], rel=1e-4)
        assert together["contrast"] == pytest.approx(alone["contrast"], rel=1e-4)
        # Summed over the batch of a process (spec 3, L_tag): the mean of two is half of the whole.
        assert 2 * together["tag"] == pytest.approx(alone["tag"], rel=1e-4)


def test_a_decoder_only_language_model_is_split_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find_checkpoint("t5-world"))
    tokenizer.save_pretrained(tmp_path / "llama")
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    bases = recipe["model"]["base_models"] | {"language": str(tmp_path / "llama")}
    settings = recipe["training"] | {"learning_rate": 0.0, "max_steps": 2, "save_every": 0}
    recipe = recipe | {"model": recipe["model"] | {"base_models": bases}, "training": settings}
    split = recipe | {"training": settings | {"shard_frozen": True}}
    for each, name in ((recipe, "two"), (split, "split")):
        done = train(each, tmp_path / name, "still", 2)
        assert done.returncode == 0, done.stderr
    for together, split_one in zip(history(tmp_path / "two"), history(tmp_path / "split"), strict=True):
        assert split_one == pytest.approx(together, rel=1e-4)
    saved = load_file(tmp_path / "split/checkpoint/model.safetensors")
    assert "llm_proj.weight" in saved
    assert not any(key.startswith("language_model.") for key in saved)


def test_a_killed_run_of_two_processes_resumes(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "whole", "moving", 2).returncode == 0
    killed = train(recipe, tmp_path / "killed", "5", 2)
    assert killed.returncode != 0
    assert "checkpoint-4" in {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert not (tmp_path / "killed" / "training.json").exists()
    resumed = train(recipe, tmp_path / "killed", "resume", 2)
    assert resumed.returncode == 0, resumed.stderr
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    # Another number of processes has other random states.
    (tmp_path / "killed" / "training.json").unlink()
    alone = train(recipe, tmp_path / "killed", "resume", 1)
    assert alone.returncode != 0
    assert "resume on as many processes as the run was started on" in alone.stderr
