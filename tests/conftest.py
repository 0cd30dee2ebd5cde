"""Checkpoints of other people's proposers in miniature, saved in their official layouts; do not write into them.
Programs of the repository as modules. And whether the tests that need a browser run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_REQUIRED = os.environ.get("FOVEATE_BROWSER") == "required"
"""Set by `.ci/run`: there, tests that do not run are no better than tests that fail."""


def pytest_report_header() -> str | None:
    if CHROMIUM or BROWSER_REQUIRED:
        return None
    return "there is no Chromium, so the tests of the page are skipped (Debian's package is chromium)"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("browser") and CHROMIUM is None:
        reason = "there is no Chromium; install Debian's package chromium"
        if BROWSER_REQUIRED:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


class _BrowserTests:
    """Fails a run of all tests in which none of the browser's came to an end."""

    def __init__(self) -> None:
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed and "browser" in report.keywords

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not self.passed and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.passed:
            terminalreporter.write_line(
                "no test of the page ran in a browser, and FOVEATE_BROWSER is required", red=True
            )


def pytest_configure(config: pytest.Config) -> None:
    if BROWSER_REQUIRED and not hasattr(config, "workerinput"):  # with pytest-xdist, the process that counts
        config.pluginmanager.register(_BrowserTests())


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests keep is not the user's, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where the browser is."""
    assert CHROMIUM is not None
    return CHROMIUM


@pytest.fixture(scope="session")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SAM with random weights: 64 x 64 pixels, 8 x 8 patches, masks of 32 x 32."""
    import torch
    from transformers.models.sam.configuration_sam import SamConfig
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
    from transformers.models.sam.modeling_sam import SamModel

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "output_channels": 16,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    model = SamModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("sam") / "tiny"
    model.save_pretrained(folder)
    SamImageProcessorPil(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def owlv2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OWLv2 with random weights: 32 x 32 pixels, 4 x 4 boxes; its tokenizer spells words, up to 24 tokens."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer
    from transformers.models.owlv2.configuration_owlv2 import Owlv2Config
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
    from transformers.models.owlv2.modeling_owlv2 import Owlv2ForObjectDetection

    letters = ["!", *(letter for letter in sorted(ByteLevel.alphabet()) if letter != "!")]  # padding is "!", 0
    ends = [f"{letter}</w>" for letter in letters]
    entries = [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    torch.manual_seed(0)
    size = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={
            **size,
            "vocab_size": len(entries),
            "hidden_size": 16,
            "max_position_embeddings": 24,
            "bos_token_id": len(entries) - 2,
            "eos_token_id": len(entries) - 1,
        },
        vision_config={**size, "hidden_size": 24, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = Owlv2ForObjectDetection(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("owlv2") / "tiny"
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!").save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_program() -> Callable[[str], ModuleType]:
    """A program of the repository, such as "tools/make_weights.py", as a module of its own; a new one at each call."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[1] / name
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
