"""A whole DynRefer checkpoint with random weights, so that the command line is tested without trained ones."""

from __future__ import annotations

from pathlib import Path

import pytest


def save_random_describer(folder: Path, *, width: int, layers: int, image_size: int = 32) -> None:
    """Writes a checkpoint as training does: network, vocabulary and both tokenizers, nothing in another folder.

    Args:
        width: of the tower, text encoder, Q-Former and language model.
        layers: of each of them.
    """
    import torch

    from foveate.methods.dynrefer.configuration import DynReferConfig
    from foveate.methods.dynrefer.modeling import DynReferModel
    from foveate.methods.dynrefer.processing import DynReferProcessor, Vocabulary
    from foveate.training.standins.clip.recipe import train_tokenizer
    from foveate.training.standins.t5.recipe import build_tokenizer
    from foveate.world.scenes import render_scene
    from foveate.world.vocabulary import attribute_vocabulary, category_names, tag_vocabulary

    scenes = [render_scene(seed, size=128) for seed in range(8)]
    captions = [caption for scene in scenes for item in scene.instances for caption in item.captions]
    text, language = train_tokenizer(captions, 560), build_tokenizer(captions)
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = DynReferConfig(
        vision_config={
            **shape,
            "model_type": "clip_vision_model",
            "intermediate_size": 4 * width,
            "image_size": image_size,
            "patch_size": 8,
            "hidden_act": "gelu",
        },
        text_config={
            **shape,
            "vocab_size": len(text),
            "intermediate_size": 4 * width,
            "max_position_embeddings": 40,
            "projection_dim": width,
            "hidden_act": "gelu",
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
        },
        qformer_config={**shape, "intermediate_size": 4 * width},
        language_config={
            "model_type": "t5",
            "vocab_size": len(language),
            "d_model": width,
            "d_kv": width // 4,
            "d_ff": 2 * width,
            "num_layers": layers,
            "num_heads": 4,
            "decoder_start_token_id": language.pad_token_id,
            "pad_token_id": language.pad_token_id,
            "eos_token_id": language.eos_token_id,
        },
        image_size=image_size,
        vision_layer=-2,
        num_query_tokens=8,
        head_size=32,
        tag_threshold=0.5,
    )
    model = DynReferModel(config)
    with torch.no_grad():  # at the usual small start every picture would get the same answer to four digits
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    vocabulary = Vocabulary.from_words(tag_vocabulary(), attribute_vocabulary(), category_names(), "foveate.world")
    DynReferProcessor(vocabulary, text, language).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_describer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny checkpoint. Read-only: copy it to damage it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_random_describer(folder, width=32, layers=2)
    return folder


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine must not add a progress line to what a test expects on stderr."""
    monkeypatch.setattr("foveate.cli.options.SECONDS_BETWEEN_LOG_LINES", float("inf"))
