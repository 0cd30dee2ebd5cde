"""Tiny checkpoints in the exact layouts that a conversion reads: LAVIS's save, BLIP-2's folder, EVA-CLIP's file.

The renaming here is written the other way round and apart from that under test.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

from foveate.language.lm import untie_lm_head
from foveate.methods.dynrefer.configuration import DynReferConfig
from foveate.methods.dynrefer.modeling import DynReferModel

TAGS = ("car", "red", "Hat", "striped dog")
WORDS = ["<pad>", "<unk>", ",", "|", "the", "is", "a", "car", "red", "hat", "striped", "dog", "person", "tree"]
OVAD = {
    "attributes": [
        {"id": 0, "name": "color:red/crimson", "is_has_att": "is", "freq_set": "head"},
        {"id": 1, "name": "clothes pattern:plain", "is_has_att": "has", "freq_set": "tail"},
    ]
}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
QFORMER = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
LANGUAGE = {
    "model_type": "t5",
    "vocab_size": 20,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
VICUNA = {
    "model_type": "llama",
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": len(WORDS),
    "eos_token_id": len(WORDS) + 1,
    "pad_token_id": 0,
}
TEXT = {
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 24,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "max_position_embeddings": 16,
    "projection_dim": 12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
    "bos_token_id": len(WORDS),
    "eos_token_id": len(WORDS) + 1,
}


@dataclass
class OfficialFiles:
    """Where the files are, and the modules whose weights they hold."""

    folder: Path
    blip2: Blip2ForConditionalGeneration
    text_encoder: CLIPTextModelWithProjection
    trained: DynReferModel

    @property
    def paths(self) -> dict[str, Path]:
        """Arguments of `convert_checkpoint`."""
        names = {
            "base": "blip2",
            "text": "eva_clip_psz14.pt",
            "text_tokenizer": "clip",
            "tags": "ram_tag_list.txt",
            "attributes": "ovad2000.json",
        }
        return {key: self.folder / name for key, name in names.items()}

    @property
    def official(self) -> Path:
        return self.folder / "vg1.2_5e.pth"

    def read(self) -> dict[str, Tensor]:
        return torch.load(self.official, weights_only=True)["model"]


def randomise(module: nn.Module, seed: int) -> Any:
    """Random values everywhere, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def tokenizer(*, clip: bool) -> PreTrainedTokenizerFast:
    """CLIP's texts begin with the last token but one and end with the last, T5's end with </s> alone."""
    words = [*WORDS, "<s>", "</s>"]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    raw.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A </s>" if clip else "$A </s>",
        special_tokens=[("<s>", len(WORDS)), ("</s>", len(WORDS) + 1)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def official_state(model: DynReferModel) -> dict[str, Tensor]:
    """The trained tensors under their official names, and the constants that the file brings along."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key.startswith(("vision_tower.", "text_encoder.", "language_model.", "query_tokens")):
            continue
        name = key
        if key.startswith("qformer."):
            name = key.replace("qformer.layernorm", "qformer.embeddings.LayerNorm")
            name = name.replace("attention.attention", "attention.self").replace("qformer.", "Qformer.bert.")
        state[name] = value.clone()
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(16)[None]
    state["clip_embeds"] = torch.zeros(len(TAGS), model.config.text_config.projection_dim)
    if "llm_proj.weight" in state:
        # The class trains a Q-Former with its branch for texts, which is given none (spec 2.11).
        width, wider = model.config.qformer_config.hidden_size, model.config.qformer_config.intermediate_size
        state["Qformer.bert.embeddings.word_embeddings.weight"] = torch.zeros(8, width)
        state["Qformer.bert.embeddings.position_embeddings.weight"] = torch.zeros(16, width)
        for layer in range(model.config.qformer_config.num_hidden_layers):
            name = f"Qformer.bert.encoder.layer.{layer}."
            state[f"{name}intermediate.dense.weight"] = torch.zeros(wider, width)
            state[f"{name}output.LayerNorm.bias"] = torch.zeros(width)
        state["llm_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    return state


def eva_state(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """The text encoder under the names of `eva_clip_psz14.pt`, beside other parts of that file."""
    state = {
        "visual.cls_token": torch.zeros(1, 1, 4),
        "logit_scale": torch.ones([]),
        "text.logit_scale": torch.ones([]),
    }
    renames = (
        (r"text_model\.embeddings\.token_embedding", "token_embedding"),
        (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"text_model\.encoder\.layers", "transformer.resblocks"),
        (r"text_model\.final_layer_norm", "ln_final"),
        (r"layer_norm(\d)", r"ln_\1"),
        (r"self_attn", "attn"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    thirds: dict[str, list[Tensor]] = {}
    weights = model.state_dict()
    for key in sorted(weights, key=lambda key: ("qkv".find(key.split("_proj")[0][-1]), key)):
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if projection := re.fullmatch(r"(.*\.attn\.)[qkv]_proj\.(weight|bias)", name):
            thirds.setdefault(f"text.{projection[1]}in_proj_{projection[2]}", []).append(weights[key])
        elif name == "text_projection.weight":
            state["text.text_projection"] = weights[key].T.contiguous()
        else:
            state[f"text.{name}"] = weights[key]
    return {**state, **{key: torch.cat(values) for key, values in thirds.items()}}


def save_lavis(path: Path, state: dict[str, Tensor]) -> None:
    """As LAVIS saves a run."""
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    config = {"run": {"max_epoch": 5}, "model": {"arch": "blip2_dynrefer_t5"}}
    torch.save({"model": state, "optimizer": optimizer, "config": config, "scaler": None, "epoch": 4}, path)


def save_blip2(
    folder: Path,
    *,
    vision: dict[str, Any],
    qformer: dict[str, Any],
    language: dict[str, Any],
    queries: int,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Blip2ForConditionalGeneration:
    """A BLIP-2 folder in shards, with the tokenizer of its language model."""
    config = Blip2Config(
        vision_config=vision,
        qformer_config={**qformer, "encoder_hidden_size": vision["hidden_size"], "vocab_size": 8},
        text_config=language,
        num_query_tokens=queries,
    )
    model: Any = Blip2ForConditionalGeneration(config)
    untie_lm_head(model.language_model)
    randomise(model, 1).to(dtype)
    if weights:
        missing = model.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys
    model.save_pretrained(folder, max_shard_size="30KB")
    tokenizer(clip=False).save_pretrained(folder)
    # transformers calls every T5 tied when it saves one; the released checkpoint says what holds. Its activation is
    # that of plain FLAN-T5, to see that it does not count.
    if language["model_type"] == "t5":
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content["text_config"] |= {"tie_word_embeddings": False, "dense_act_fn": "gelu_new"}
        path.write_text(json.dumps(content))
    return model


def write_official_files(
    folder: Path, dtype: torch.dtype = torch.float32, language: dict[str, Any] = LANGUAGE
) -> OfficialFiles:
    """All files of a tiny released model: two views, 16-wide heads, a three-layer Q-Former."""
    torch.manual_seed(0)
    blip2 = save_blip2(folder / "blip2", vision=VISION, qformer=QFORMER, language=language, queries=5, dtype=dtype)
    text_encoder = randomise(CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)), 2).to(dtype)
    config = DynReferConfig(
        vision_config={**VISION, "model_type": "blip_2_vision_model"},
        qformer_config=QFORMER,
        language_config=language,
        text_config=TEXT,
        num_views=2,
        image_size=56,
        num_query_tokens=5,
        head_size=16,
        head_layers=2,
        align_groups=2,
    )
    trained = randomise(DynReferModel(config), 3).to(dtype)
    files = OfficialFiles(folder, blip2, text_encoder, trained)
    save_lavis(files.official, official_state(trained))
    torch.save(eva_state(text_encoder), files.paths["text"])
    tokenizer(clip=True).save_pretrained(files.paths["text_tokenizer"])
    files.paths["tags"].write_text("\n".join(TAGS) + "\n")
    files.paths["attributes"].write_text(json.dumps(OVAD))
    return files
