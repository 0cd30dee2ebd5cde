"""LoRA and QLoRA of the language model by peft (spec 3.4: the video variant's second stage)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from foveate.errors import RecipeError
from foveate.training.recipes import RecipeSection

from .modeling import MGLlavaModel


class LoraSettings(RecipeSection):
    """Low-rank adapters on all linear layers of the language model but its head; the defaults are the paper's."""

    rank: int = Field(512, gt=0, le=65_536)
    alpha: float = Field(256.0, gt=0, le=1e6, description="the adapters count alpha / rank times")
    dropout: float = Field(0.05, ge=0, lt=1)
    quantise: Literal["nf4"] | None = Field(
        None, description="nf4: QLoRA, the language model in 4 bits; needs a CUDA GPU and bitsandbytes"
    )


def check_quantisation() -> None:
    """Raises:
    RecipeError: 4-bit weights cannot be had here.
    """
    lacking = []
    if not torch.cuda.is_available():
        lacking.append("a CUDA GPU")
    if importlib.util.find_spec("bitsandbytes") is None:
        lacking.append("the package bitsandbytes (pip install bitsandbytes)")
    if lacking:
        raise RecipeError(
            f"model.lora.quantise is nf4 (QLoRA), for which {' and '.join(lacking)} is missing here; set it to null to "
            "train plain LoRA."
        )


def quantisation(skip: Sequence[str] = ()) -> Any:
    """NF4 with double quantisation, computed in bfloat16 (spec 3.4).

    Args:
        skip: modules that stay as they are; by default the head alone.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(skip) or None,
    )


class Adapters:
    """The adapters of a model's language model, which are put in place, and which alone of it are trained.

    Args:
        model: its stage has been set.
        settings: of the adapters.
    """

    def __init__(self, model: MGLlavaModel, settings: LoraSettings) -> None:
        from peft import LoraConfig, get_peft_model

        self.model, self.quantised = model, settings.quantise is not None
        self._state: dict[str, torch.Tensor] | None = None
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType] - a whole number in peft's hints only
            lora_dropout=settings.dropout,
            target_modules="all-linear",
        )
        self.peft: Any = get_peft_model(model.language_model, config)

    def save(self, folder: Path) -> None:
        """Write the adapters as peft does; `peft.PeftModel.from_pretrained(language model, folder)` reads them."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        if self._state is None:  # once, for `merged` takes the adapters out of the model
            state = get_peft_model_state_dict(self.peft)
            self._state = {key: value.detach().cpu().float().contiguous() for key, value in state.items()}
        folder.mkdir(parents=True, exist_ok=True)
        config = self.peft.peft_config["default"]
        config.base_model_name_or_path = None  # where it lay on the machine that trained is nobody's business
        training, config.inference_mode = config.inference_mode, True
        config.save_pretrained(folder)
        config.inference_mode = training
        save_file(self._state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def merged(self, whole: Callable[[], MGLlavaModel]) -> MGLlavaModel:
        """The model with the adapters added to the weights they adapt.

        Args:
            whole: gives the model as it was before training, for one whose weights are quantised: those would lose
                what the adapters add.
        """
        if not self.quantised:
            if self.model.language_model is self.peft.get_base_model() and self._has_adapters():
                self.model.language_model = self.peft.merge_and_unload()
            return self.model
        from peft import PeftModel

        start = whole()
        bridges = {
            name: value
            for name, value in self.model.state_dict().items()
            if not name.startswith(("language_model.", "vision_tower.", "high_res_tower."))
        }
        start.load_state_dict(bridges, strict=False)
        adapted: Any = PeftModel(start.language_model, self.peft.peft_config["default"])
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(adapted, self._state)
        start.language_model = adapted.merge_and_unload()
        return start

    def _has_adapters(self) -> bool:
        return any("lora_" in name for name, _ in self.model.language_model.named_parameters())
