"""Official files -> a folder: every tensor arrives, every fault is named, nothing half-written is left."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

import foveate
from foveate.errors import CheckpointError, InputError
from foveate.language.words import COCO_CLASSES
from foveate.methods.dynrefer.conversion import (
    check_checkpoint,
    convert_checkpoint,
    convert_state_dict,
    initialise_from_blip2,
)
from foveate.methods.dynrefer.modeling import DynReferModel

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "golden" / "dynrefer"


@pytest.fixture(scope="session")
def files(official_files: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All source files in float32; do not change them."""
    return official_files.write_official_files(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="session")
def converted(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that they become; do not write into it."""
    out = tmp_path_factory.mktemp("converted") / "dynrefer"
    result = convert_checkpoint(files.official, **files.paths, out=out, max_shard_size="40KB")
    assert result.folder == out
    return out


@pytest.fixture
def changed(files: Any, official_files: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the released file with some tensors replaced, or taken away (None)."""

    def write(**changes: Any) -> Path:
        state = files.read() | changes.pop("tensors", {}) | changes
        path = tmp_path / "changed.pth"
        official_files.save_lavis(path, {key: value for key, value in state.items() if value is not None})
        return path

    return write


def parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def test_every_tensor_arrives(files: Any, converted: Path) -> None:
    model = DynReferModel.from_pretrained(converted)
    expected = {
        key: value
        for key, value in parameters(files.trained).items()
        if not key.startswith(("vision_tower.", "text_encoder.", "language_model.", "query_tokens"))
    }
    expected |= {f"text_encoder.{key}": value for key, value in parameters(files.text_encoder).items()}
    expected |= {f"vision_tower.model.{key}": value for key, value in parameters(files.blip2.vision_model).items()}
    expected |= {f"language_model.{key}": value for key, value in parameters(files.blip2.language_model).items()}
    expected["query_tokens"] = files.blip2.query_tokens
    found = parameters(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(found["language_model.lm_head.weight"], found["language_model.shared.weight"])


def test_sizes_are_read_from_the_shapes(converted: Path) -> None:
    config = DynReferModel.from_pretrained(converted).config
    assert (config.num_views, config.num_query_tokens, config.align_groups) == (2, 5, 2)
    assert (config.head_size, config.head_layers, config.image_size) == (16, 2, 56)
    assert config.qformer_config.num_hidden_layers == 3
    text = config.text_config
    assert (text.num_hidden_layers, text.num_attention_heads, text.max_position_embeddings) == (2, 12, 16)
    assert (text.hidden_act, text.projection_dim, text.eos_token_id) == ("gelu", 12, 15)
    assert config.base_models == {}


def test_the_traps_of_the_frozen_parts(files: Any, converted: Path) -> None:
    """Spec 2.2 and 2.10: the tower's last norm has eps 1e-5, FLAN-T5 the exact GELU and outputs that are not scaled."""
    model = DynReferModel.from_pretrained(converted)
    norm: Any = model.vision_tower.model.post_layernorm
    assert norm.eps == 1e-5
    assert model.config.language_config.dense_act_fn == "gelu"
    assert not model.config.language_config.scale_decoder_outputs
    ids = {"input_ids": torch.tensor([[7, 8, 15]]), "decoder_input_ids": torch.tensor([[0, 9]])}
    with torch.no_grad():
        assert torch.allclose(model.language_model(**ids).logits, files.blip2.language_model(**ids).logits, atol=1e-7)
        pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
        files.blip2.vision_model.post_layernorm.eps = 1e-5
        expected = files.blip2.vision_model(pixels).last_hidden_state
        assert torch.allclose(model.encode_views(pixels), expected, atol=1e-5)


def test_foveate_and_transformers_load_the_folder(converted: Path) -> None:
    describer = foveate.load(converted, device="cpu")
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    region = describer(image, boxes=[[10, 10, 50, 40]])[0]
    assert set(region.tag_scores) == {"car", "red", "Hat", "striped dog"}
    assert set(region.attribute_scores) == {"color:red/crimson", "clothes pattern:plain"}
    assert set(region.category_scores) == set(COCO_CLASSES)
    model = AutoModel.from_pretrained(converted)
    assert type(model) is DynReferModel
    again = describer.model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def test_a_saved_copy_is_the_same(converted: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(converted)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_vocabulary(converted: Path) -> None:
    content = json.loads((converted / "vocabulary.json").read_text())
    assert content["tags"] == ["car", "red", "Hat", "striped dog"]
    assert content["attributes"][0]["prompts"] == ["the red", "the  is red", "the crimson", "the  is crimson"]
    assert content["attributes"][1]["prompts"] == ["the plain clothes pattern", "the  has plain clothes pattern"]
    assert (len(content["classes"]), content["classes"][-1]) == (80, "toothbrush")
    assert content["source"] == "ram_tag_list.txt, ovad2000.json"


def test_manifest(files: Any, converted: Path) -> None:
    manifest = json.loads((converted / "manifest.json").read_text())
    assert manifest["foveate"] == foveate.__version__
    assert manifest["sources"]["official"] == {files.official.name: sha256(files.official)}
    assert {"model.safetensors.index.json", "config.json"} < set(manifest["sources"]["base"])
    written = {str(path.relative_to(converted)) for path in converted.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == written - {"manifest.json"}
    assert all(sha256(converted / name) == value for name, value in manifest["files"].items())
    assert manifest["unused"]["official"] == ["Qformer.bert.embeddings.position_ids", "clip_embeds"]
    assert manifest["unused"]["text"] == ["logit_scale", "text.logit_scale", "visual.cls_token"]
    assert "language_projection.weight" in manifest["unused"]["base"]
    assert str(files.folder) not in (converted / "manifest.json").read_text()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_are_in_shards_with_an_index(converted: Path) -> None:
    shards = sorted(converted.glob("model-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    for shard in shards:
        assert all(index["weight_map"][key] == shard.name for key in load_file(shard))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_files_is_kept(official_files: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    files = official_files.write_official_files(tmp_path / "files", dtype)
    out = tmp_path / "out"
    convert_checkpoint(files.official, **files.paths, out=out)
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {dtype}
    model = AutoModel.from_pretrained(out)
    # transformers keeps the output layers of a T5's feed-forwards in float32 beside float16, where they overflow.
    kept = {key for key, value in model.named_parameters() if value.dtype != dtype}
    assert kept == {key for key, _ in model.named_parameters() if ".wo." in key and dtype == torch.float16}
    assert bool(kept) == (dtype == torch.float16)
    assert torch.equal(model.query_tokens, files.blip2.query_tokens)


def test_another_dtype(files: Any, changed: Any, tmp_path: Path) -> None:
    convert_checkpoint(files.official, **files.paths, out=tmp_path / "half", dtype="bfloat16")
    assert {value.dtype for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    large = changed(cem_memory=torch.full((16,), 1e6))
    with pytest.raises(CheckpointError, match=r"too large for torch.float16 \(cem_memory\)"):
        convert_checkpoint(large, **files.paths, out=tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_mixed_dtypes_are_kept_and_load_in_the_widest(files: Any, changed: Any, tmp_path: Path) -> None:
    half = changed(cem_memory=torch.ones(16, dtype=torch.float16))
    result = convert_checkpoint(half, **files.paths, out=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["cem_memory"].dtype == torch.float16
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert {part.name: part.dtype for part in result.parts}["captioner's input"] == "float16, float32"


def test_check_counts_and_writes_nothing(files: Any) -> None:
    before = sorted(files.folder.rglob("*"))
    result = check_checkpoint(files.official, base=files.paths["base"], text=files.paths["text"])
    assert sorted(files.folder.rglob("*")) == before
    parts = {part.name: part for part in result.parts}
    assert sum(part.parameters for part in parts.values()) == sum(
        value.numel() for module in (files.trained, files.blip2.language_model.lm_head) for value in module.parameters()
    )
    assert (parts["tag head"].source, parts["vision tower"].source, parts["text encoder"].source) == (
        "official",
        "base",
        "text",
    )
    assert parts["fusion"].tensors == 4
    assert result.folder is None


# ---------------------------------------------------------------- files that do not fit


def test_all_misfits_are_one_error(files: Any, changed: Any, tmp_path: Path) -> None:
    state = files.read()
    query = "Qformer.bert.encoder.layer.1.attention.self.query.weight"
    broken = changed(
        tensors={
            "tag_fc.weight": None,
            "attr_fc.weightt": state["attr_fc.weight"],
            "attr_fc.weight": None,
            query: None,
            # What ours is called must not pass for what theirs is called.
            query.replace("attention.self", "attention.attention"): state[query],
            "cvem_mlp.2.weight": state["cvem_mlp.2.weight"][:5],
            "attr_t": torch.tensor(2),
        }
    )
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(broken, **files.paths, out=tmp_path / "out")
    sentence = str(caught.value)
    assert f"3 missing ({query}, attr_fc.weight, tag_fc.weight)" in sentence
    assert f"2 unknown ({query.replace('self', 'attention')}, attr_fc.weightt)" in sentence
    assert "1 of another shape (cvem_mlp.2.weight (5, 32) for (32, 32))" in sentence
    assert "1 not dense float16, bfloat16 or float32 (attr_t torch.int64)" in sentence
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("key", "rows"),
    [
        ("cvem_mlp.0.weight", 3),
        ("tag_fc.weight", 0),
        ("cvem_align.offset_mask.bias", 9),
        ("tag_vision_proj.bias", 4),
        ("cem_memory", 5),
    ],
)
def test_a_cut_tensor_is_the_only_one_named(files: Any, changed: Any, key: str, rows: int) -> None:
    """Also where sizes of the configuration are read from it."""
    cut = changed(tensors={key: files.read()[key][:rows]})
    with pytest.raises(CheckpointError, match="do not make a DynRefer: 1 of another shape") as caught:
        check_checkpoint(cut, base=files.paths["base"], text=files.paths["text"])
    assert key in str(caught.value)


def test_a_lost_layer_is_missing(files: Any, changed: Any) -> None:
    lost = {key: None for key in files.read() if ".layer.2." in key}
    with pytest.raises(CheckpointError, match=f"{len(lost)} missing"):
        check_checkpoint(changed(tensors=lost), base=files.paths["base"], text=files.paths["text"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(files: Any, changed: Any, tmp_path: Path, value: float) -> None:
    broken = changed(attr_b=torch.tensor(value))
    with pytest.raises(CheckpointError, match=r"not finite \(attr_b\)"):
        convert_checkpoint(broken, **files.paths, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("text.ln_final.bias"), r"1 missing \(text.ln_final.bias\)"),
        (lambda state: state.update({"text.more": torch.ones(2)}), r"1 unknown \(text.more\)"),
        (
            lambda state: state.pop("text.transformer.resblocks.0.attn.in_proj_weight"),
            r"1 missing \(text.transformer.resblocks.0.attn.in_proj_weight\)",
        ),
        (lambda state: state.update({"text.text_projection": torch.ones(24, 11)}), "tag_text_proj.weight"),
    ],
)
def test_text_encoder_that_does_not_fit(files: Any, tmp_path: Path, change: Any, sentence: str) -> None:
    state = torch.load(files.paths["text"], weights_only=True)
    change(state)
    torch.save(state, tmp_path / "eva.pt")
    with pytest.raises(CheckpointError, match=sentence):
        check_checkpoint(files.official, base=files.paths["base"], text=tmp_path / "eva.pt")


def test_base_that_does_not_fit(files: Any, converted: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(files.paths["base"], tmp_path / "blip2"))

    def check() -> str:
        with pytest.raises(CheckpointError) as caught:
            check_checkpoint(files.official, base=folder, text=files.paths["text"])
        return str(caught.value)

    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    assert f"{shard} is damaged or truncated" in check()
    shard.unlink()
    assert f"lacks {shard.name}" in check()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = {key for key, name in index["weight_map"].items() if name == shard.name}
    index["weight_map"] = {key: name for key, name in index["weight_map"].items() if key not in lost}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    frozen = {key for key in lost if not key.startswith(("qformer.", "language_projection."))}
    assert frozen
    assert all(key in check() for key in frozen)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert "has model_type 't5'; the base must be a BLIP-2 checkpoint" in check()


class Code:
    """Runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_with_code_does_not_run(files: Any, tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"model": files.read(), "config": Code(marker)}, path)
    for name in ("official", "text"):
        sources = {"official": files.official, "base": files.paths["base"], "text": files.paths["text"], name: path}
        with pytest.raises(CheckpointError, match=r"holds more than tensors and plain values \(\w+.mkdir\)"):
            check_checkpoint(**sources)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda data: data[: len(data) // 2], "is damaged, truncated or not a PyTorch file"),
        (lambda data: b"", "is damaged, truncated or not a PyTorch file"),
        (lambda data: b"a photograph", "is damaged, truncated or not a PyTorch file"),
    ],
)
def test_files_that_are_none(files: Any, tmp_path: Path, content: Callable[[bytes], bytes], sentence: str) -> None:
    path = tmp_path / "official.pth"
    path.write_bytes(content(files.official.read_bytes()))
    with pytest.raises(CheckpointError, match=sentence):
        check_checkpoint(path, base=files.paths["base"], text=files.paths["text"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "holds a list instead of named tensors"),
        ({}, "holds nothing instead of named tensors"),
        ({"cem_memory": torch.ones(1), "epoch": 4}, r"1 entries that are not named tensors \(epoch\)"),
        ({"model": {"cem_memory": [1.0], 3: torch.ones(1)}}, r"2 entries that are not named tensors \(cem_memory, 3\)"),
    ],
)
def test_content_that_is_no_weights(files: Any, tmp_path: Path, content: Any, sentence: str) -> None:
    torch.save(content, tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match=sentence):
        check_checkpoint(tmp_path / "official.pth", base=files.paths["base"], text=files.paths["text"])


def test_a_bare_state_dict_and_the_old_file_format(files: Any, tmp_path: Path) -> None:
    torch.save(files.read(), tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    sources = {"base": files.paths["base"], "text": files.paths["text"]}
    assert check_checkpoint(tmp_path / "bare.pth", **sources).parts == check_checkpoint(files.official, **sources).parts


# ---------------------------------------------------------------- the other files


@pytest.mark.parametrize(
    ("option", "content", "sentence"),
    [
        ("tags", "car\nred\n", "has 2 tags, but .* was trained with 4"),
        ("tags", "car\n\nred\nHat\n", "has an empty line 2"),
        ("tags", "", "is empty"),
        ("classes", "\n", "has an empty line 1"),
        ("attributes", "[]", "ovad2000.json"),
        ("attributes", '{"attributes": [{"name": "color:red"}]}', "attribute 0 needs a 'name' and 'is_has_att'"),
        ("attributes", '{"attributes": {}}', "has no list of attributes"),
    ],
)
def test_word_lists_that_are_wrong(files: Any, tmp_path: Path, option: str, content: str, sentence: str) -> None:
    path = tmp_path / ("ovad2000.json" if option == "attributes" else "list.txt")
    path.write_text(content)
    with pytest.raises(InputError, match=sentence):
        convert_checkpoint(files.official, **{**files.paths, option: path}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_that_are_wrong(files: Any, tmp_path: Path) -> None:
    for option in ("tags", "text"):
        paths = {**files.paths, option: tmp_path / "none.pt"}
        with pytest.raises(InputError, match=r"none\.pt"):
            convert_checkpoint(files.official, **paths, out=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        convert_checkpoint(files.official, **files.paths, out=tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_tokenizer_that_is_not_clips(files: Any, official_files: Any, tmp_path: Path) -> None:
    other = official_files.tokenizer(clip=True)
    other.add_tokens(["more"])
    other.save_pretrained(tmp_path / "longer")
    other = official_files.tokenizer(clip=True)
    other.eos_token = "dog"
    other.save_pretrained(tmp_path / "another")
    for name, sentence in (("longer", "knows 17 tokens and the text model 16"), ("another", "ends a text with token")):
        with pytest.raises(InputError, match=sentence):
            paths = {**files.paths, "text_tokenizer": tmp_path / name}
            convert_checkpoint(files.official, **paths, out=tmp_path / "out")


def test_text_encoder_in_the_layout_of_transformers(files: Any, official_files: Any, tmp_path: Path) -> None:
    files.text_encoder.save_pretrained(tmp_path / "clip")
    official_files.tokenizer(clip=True).save_pretrained(tmp_path / "clip")
    paths = {**files.paths, "text": tmp_path / "clip", "text_tokenizer": None}
    convert_checkpoint(files.official, **paths, out=tmp_path / "out")
    model = DynReferModel.from_pretrained(tmp_path / "out")
    expected = parameters(files.text_encoder)
    assert all(torch.equal(value, expected[key]) for key, value in parameters(model.text_encoder).items())


def test_frozen_tensors_of_the_released_file_are_preferred(files: Any, changed: Any, tmp_path: Path) -> None:
    mine = torch.full((1, 5, 24), 0.5)
    convert_checkpoint(changed(query_tokens=mine), **files.paths, out=tmp_path / "out")
    assert torch.equal(DynReferModel.from_pretrained(tmp_path / "out").query_tokens, mine)
    assert "query_tokens" in json.loads((tmp_path / "out" / "manifest.json").read_text())["unused"]["base"]


# ---------------------------------------------------------------- training from BLIP-2


def test_initialise_from_blip2(files: Any) -> None:
    model = DynReferModel(files.trained.config)
    fresh = {key: value.clone() for key, value in parameters(model).items()}
    assert initialise_from_blip2(model, files.paths["base"]) is model
    blip2 = parameters(files.blip2)
    for key, value in parameters(model).items():
        if key.startswith(("qformer.", "query_tokens")):
            assert torch.equal(value, blip2[key]), key
        elif key.startswith("t5_proj."):
            assert torch.equal(value, blip2[key.replace("t5_proj", "language_projection")]), key
        else:
            assert torch.equal(value, fresh[key]), key
    layers = {key.split(".")[3] for key in blip2 if "crossattention" in key}
    assert layers == {"0", "2"}


def test_initialise_from_a_blip2_of_another_size(files: Any, make_model: Callable[..., DynReferModel]) -> None:
    with pytest.raises(CheckpointError, match="unknown ones"):
        initialise_from_blip2(make_model(), files.paths["base"])


# ---------------------------------------------------------------- reference arrays


def test_a_converted_folder_equals_the_reference(
    official_files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden weights in the layouts of the released files, converted and loaded; then each module and all in one
    chain against the golden outputs, within the tolerances that belong to them."""
    monkeypatch.syspath_prepend(str(TESTS.parent / "tools"))
    golden_dynrefer = importlib.import_module("golden.dynrefer")
    golden = importlib.import_module("golden").GoldenFolder(GOLDEN)
    sizes, weights = golden["model_config.json"], golden.weights()
    text = {key: value for key, value in weights.items() if key.startswith("text.")}
    frozen = {key: value for key, value in weights.items() if key.startswith(("t5_model.", "ln_vision."))}
    frozen["query_tokens"] = weights["query_tokens"]
    trained = {key: value for key, value in weights.items() if key not in text and key not in frozen}
    vision = {
        "hidden_size": sizes["C"],
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": sizes["img"],
        "patch_size": 14,
    }
    reference = golden_dynrefer.build_model(sizes, weights).config
    official_files.save_blip2(
        tmp_path / "blip2",
        vision=vision,
        qformer={
            "hidden_size": sizes["qh"],
            "num_hidden_layers": sizes["ql"],
            "num_attention_heads": sizes["qheads"],
            "intermediate_size": sizes["qi"],
        },
        language={**reference.language_config.to_dict(), "tie_word_embeddings": False},
        queries=sizes["nq"],
        weights={
            key.replace("t5_model.", "language_model.").replace("ln_vision.", "vision_model.post_layernorm."): value
            for key, value in frozen.items()
        },
    )
    official_files.save_lavis(tmp_path / "official.pth", trained)
    torch.save({**text, "visual.proj": torch.zeros(2)}, tmp_path / "eva.pt")
    clip = official_files.tokenizer(clip=True)
    clip.add_tokens([f"word{index}" for index in range(sizes["text"]["vocab"] - len(clip) - 1)])
    clip.add_special_tokens({"eos_token": "<end>"})
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "tags.txt").write_text("\n".join(f"tag {index}" for index in range(sizes["ntags"])))
    convert_checkpoint(
        tmp_path / "official.pth",
        base=tmp_path / "blip2",
        text=tmp_path / "eva.pt",
        text_tokenizer=tmp_path / "clip",
        text_heads=sizes["text"]["heads"],
        tags=tmp_path / "tags.txt",
        out=tmp_path / "out",
    )

    model = DynReferModel.from_pretrained(tmp_path / "out")
    model.config.generation |= {"num_beams": sizes["beams"], "max_new_tokens": sizes["mnt"]}
    embeds = {key: value for key, value in weights.items() if key.endswith("_embeds")}
    report = importlib.import_module("golden").Report()
    with torch.no_grad():
        golden_dynrefer.check_align(model, golden["align.safetensors"], report)
        golden_dynrefer.check_refer(model, golden["refer.safetensors"], report)
        golden_dynrefer.check_decoders(
            model, golden["decoders.safetensors"], embeds, sizes["kwargs"]["tag_thr"], report
        )
        golden_dynrefer.check_captioner(model, golden["llm.safetensors"], report)
        golden_dynrefer.check_text_encoder(model, golden["text_encoder.safetensors"], report)
        golden_dynrefer.check_chain(model, golden, embeds, report)
    assert report.failures == 0, "\n".join(report.lines())
    assert len(report.rows) >= 30
    assert not report.notes


def test_convert_state_dict_names_every_unknown_key(files: Any) -> None:
    state = files.read()
    assert "qformer.layernorm.weight" in convert_state_dict(state)
    with pytest.raises(CheckpointError, match=r"2 keys are not DynRefer's: lora_A, module\.cem_memory"):
        convert_state_dict({**state, "module.cem_memory": state["cem_memory"], "lora_A": torch.ones(1)})


def test_the_text_encoder_computes_the_same(files: Any, converted: Path) -> None:
    ids = torch.tensor([[14, 7, 8, 15, 0], [14, 4, 10, 11, 15]])
    original: CLIPTextModelWithProjection = files.text_encoder
    with torch.no_grad():
        found = DynReferModel.from_pretrained(converted).encode_text(ids)
        assert torch.allclose(found, original(input_ids=ids).text_embeds, atol=1e-6)
