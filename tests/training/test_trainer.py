from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from foveate.errors import CheckpointError, RecipeError
from foveate.training.sampling import EpochSampler, SeededDataset
from foveate.training.trainer import TrainingTask, parameter_groups, resolve_precision, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole_run(tiny, tmp_path_factory):
    """An uninterrupted run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run(tiny.make_task(), tiny.make_settings(), tmp_path_factory.mktemp("whole") / "out", tiny.SEED)
    torch.set_num_threads(threads)
    return result


def weights(result) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(result.checkpoint / "model.safetensors")


def assert_same_weights(first, second) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_learns_and_leaves_what_it_promises(whole_run):
    history = whole_run.history
    assert whole_run.steps == 40
    assert [entry["step"] for entry in history] == [*range(3, 16, 3), 16, *range(18, 31, 3), 32, 33, 36, 39, 40]
    errors = [entry["error"] for entry in history]
    assert sum(errors[-5:]) < 0.6 * sum(errors[:5])
    for entry in history:
        assert entry["loss"] == pytest.approx(entry["error"] + entry["size"], rel=1e-5)
    assert sorted(path.name for path in (whole_run.output / "checkpoints").iterdir()) == [
        "checkpoint-32",
        "checkpoint-40",
    ]
    assert (whole_run.output / "training.json").is_file()
    assert any((whole_run.output / "logs").glob("events.out.tfevents*"))


def test_logged_learning_rates_are_the_schedule(whole_run):
    rates = {entry["step"]: entry["learning_rate"] for entry in whole_run.history}
    assert rates[3] == pytest.approx(3e-3 * 3 / 5)
    # step 18 is the 18th: factor(17) of a cosine over the 35 steps after the warm-up, 12/35 of them done
    assert rates[18] == pytest.approx(3e-3 * 0.736862, rel=1e-4)


def test_a_killed_and_resumed_run_has_the_same_loss_curve(tiny, whole_run, tmp_path):
    output = tmp_path / "out"
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, tiny.__file__, str(output), "30"], env=environment, capture_output=True, text=True
    )
    assert child.returncode == -9, child.stderr
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["checkpoint-16"]
    assert not (output / "checkpoint").exists()

    with pytest.raises(RecipeError, match=r"unfinished run \(checkpoint-16\)"):
        run(tiny.make_task(), tiny.make_settings(), output, tiny.SEED)
    resumed = run(tiny.make_task(), tiny.make_settings(), output, tiny.SEED, resume=True)
    assert resumed.history == whole_run.history
    assert_same_weights(resumed, whole_run)


def test_resuming_from_a_given_checkpoint_and_at_the_very_end(tiny, whole_run, tmp_path):
    middle = whole_run.output / "checkpoints" / "checkpoint-32"
    resumed = run(tiny.make_task(), tiny.make_settings(), tmp_path / "a", tiny.SEED, resume=middle)
    assert resumed.history == whole_run.history
    assert_same_weights(resumed, whole_run)
    end = whole_run.output / "checkpoints" / "checkpoint-40"
    resumed = run(tiny.make_task(), tiny.make_settings(), tmp_path / "b", tiny.SEED, resume=end)
    assert (resumed.steps, resumed.history) == (40, whole_run.history)
    assert_same_weights(resumed, whole_run)


def test_resuming_where_there_is_no_checkpoint_starts_from_the_beginning(tiny, tmp_path):
    settings = tiny.make_settings(max_steps=4, save_every=0)
    fresh = run(tiny.make_task(), settings, tmp_path / "a", tiny.SEED)
    resumed = run(tiny.make_task(), settings, tmp_path / "b", tiny.SEED, resume=True)
    assert resumed.history == fresh.history


def test_resume_at_the_end_of_an_epoch_with_accumulation(tiny, tmp_path):
    # 12 batches an epoch, 5 a step: steps of 5, 5 and 2 batches; the checkpoint at step 3 is the end of an epoch.
    settings = tiny.make_settings(max_steps=8, gradient_accumulation=5, save_every=3, log_every=1)
    whole = run(tiny.make_task(), settings, tmp_path / "whole", tiny.SEED)
    again = run(
        tiny.make_task(),
        settings.model_copy(update={"keep_checkpoints": 9}),
        tmp_path / "again",
        tiny.SEED,
    )
    assert [entry["epoch"] for entry in whole.history][:4] == pytest.approx([5 / 12, 10 / 12, 1, 1 + 5 / 12])
    start = again.output / "checkpoints" / "checkpoint-3"
    resumed = run(tiny.make_task(), settings, tmp_path / "resumed", tiny.SEED, resume=start)
    assert resumed.history == whole.history


def test_a_finished_run_may_be_replaced(tiny, tmp_path):
    first = run(tiny.make_task(), tiny.make_settings(max_steps=20), tmp_path, tiny.SEED)
    second = run(tiny.make_task(), tiny.make_settings(max_steps=4), tmp_path, tiny.SEED)
    assert (first.steps, second.steps) == (20, 4)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]


def _garbage_inside(path: Path) -> None:
    torch.save({"python": 1, "state": "not a state"}, path)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("model.safetensors", truncate, "cannot be read"),
        ("optimizer.pt", truncate, "is missing or truncated"),
        ("optimizer.pt", _garbage_inside, "is damaged or of another model"),
        ("scheduler.pt", Path.unlink, "is missing or truncated"),
        ("trainer_state.json", truncate, "cannot be read"),
        ("trainer_state.json", lambda path: path.write_text('{"global_step": "32"}'), "global_step is '32'"),
        ("trainer_state.json", lambda path: path.write_text('{"global_step": 32, "zebra": 1}'), "'zebra'"),
        ("rng_state.pth", Path.unlink, "is missing; resume on as many processes"),
        ("rng_state.pth", truncate, "cannot be read"),
        ("rng_state.pth", lambda path: path.write_bytes(b"garbage"), "cannot be read"),
        ("rng_state.pth", _garbage_inside, "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_and_the_run_stays_as_it_was(
    tiny, whole_run, tmp_path, name, damage, sentence
):
    output = tmp_path / "out"
    shutil.copytree(whole_run.output, output)
    (output / "recipe.yaml").write_text("of the first start")
    newest = output / "checkpoints" / "checkpoint-40"
    damage(newest / name)
    before = contents(output)

    def save_recipe(folder: Path) -> None:
        (folder / "recipe.yaml").write_text("of the resume")

    with pytest.raises(CheckpointError, match=f"({name}|optimiser state) .*{sentence}") as caught:
        run(tiny.make_task(), tiny.make_settings(max_steps=60), output, tiny.SEED, True, save_recipe)
    assert contents(output) == before
    # What the sentence advises.
    assert f"delete the folder {newest} to resume from the checkpoint before it" in str(caught.value)
    shutil.rmtree(newest)
    resumed = run(tiny.make_task(), tiny.make_settings(), output, tiny.SEED, True, save_recipe)
    assert resumed.history == whole_run.history
    assert (output / "recipe.yaml").read_text() == "of the resume"


def test_a_checkpoint_of_another_model_is_an_error(tiny, whole_run, tmp_path):
    task = tiny.make_task()
    task.model.get_submodule("layers.5").register_parameter("bias", None)
    checkpoint = whole_run.output / "checkpoints" / "checkpoint-32"
    with pytest.raises(CheckpointError, match=r"1 tensors differ, such as layers\.5\.bias"):
        run(task, tiny.make_settings(), tmp_path, tiny.SEED, resume=checkpoint)


def test_data_loading_workers_change_nothing(tiny, whole_run, tmp_path):
    with_workers = run(tiny.make_task(), tiny.make_settings(workers=2), tmp_path / "a", tiny.SEED)
    assert with_workers.history == whole_run.history
    at_epoch_end = tiny.make_settings(workers=1, save_every=12, keep_checkpoints=9)
    whole = run(tiny.make_task(), at_epoch_end, tmp_path / "b", tiny.SEED)
    start = whole.output / "checkpoints" / "checkpoint-24"
    resumed = run(tiny.make_task(), at_epoch_end, tmp_path / "c", tiny.SEED, resume=start)
    assert resumed.history == whole.history


class Linear(nn.Module):
    """Without dropout or batch statistics, so that accumulation has to give the same gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor, **kwargs: object) -> ModelOutput:
        return ModelOutput(loss=((self.layers(x)[:, 0] - y) ** 2).mean())


def test_gradient_accumulation_equals_the_larger_batch(tiny, tmp_path):
    def losses(batch_size: int, accumulation: int) -> list[float]:
        settings = tiny.make_settings(
            max_steps=24, batch_size=batch_size, gradient_accumulation=accumulation, log_every=1, save_every=0
        )
        task = TrainingTask(Linear(), tiny.NoisyLine(96))
        return [entry["loss"] for entry in run(task, settings, tmp_path / str(batch_size), 0).history]

    whole, split = losses(8, 1), losses(4, 2)
    assert split == pytest.approx(whole, rel=1e-4)
    assert whole[-1] < 0.5 * whole[0]


def test_gradient_clipping_bounds_the_step(tiny, tmp_path):
    task = TrainingTask(Linear(), tiny.NoisyLine(8))
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    batch = [task.train_dataset[key] for key in EpochSampler(task.train_dataset, 0)]
    x, y = (torch.stack([sample[name] for sample in batch]) for name in ("x", "y"))
    reference = Linear()
    reference(x, y).loss.backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    # eps dominates the second moment when gradients are clipped to 1e-8: the step is then visibly smaller than lr.
    settings = tiny.make_settings(
        max_steps=1, log_every=1, max_grad_norm=1e-8, learning_rate=1.0, weight_decay=0.0, warmup_steps=0
    )
    result = run(task, settings, tmp_path, 0)
    assert result.history[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for name, parameter in task.model.named_parameters():
        gradient = dict(reference.named_parameters())[name].grad
        assert gradient is not None
        clipped = gradient * (1e-8 / norm)
        expected = before[name] - clipped / (clipped.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach().cpu(), expected, rtol=1e-3, atol=1e-4)


def test_weight_decay_groups():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2), nn.Embedding(5, 4))
    model[2].weight.requires_grad_(False)
    model.scale = nn.Parameter(torch.zeros(()))
    decayed, plain = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {tuple(p.shape) for p in decayed["params"]} == {(4, 3, 3, 3), (5, 4)}
    assert sorted(tuple(p.shape) for p in plain["params"]) == [(), (2,), (4,), (4,), (4,)]


def test_a_task_can_give_its_own_parameter_groups(tiny, tmp_path):
    task = tiny.make_task()
    task = replace(
        task, parameter_groups=lambda model: [{"params": [model.get_parameter("layers.5.bias")], "weight_decay": 0.0}]
    )
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    run(task, tiny.make_settings(max_steps=2), tmp_path, 0)
    changed = {name for name, p in task.model.named_parameters() if not torch.equal(p.detach().cpu(), before[name])}
    assert changed == {"layers.5.bias"}


def test_frozen_parameters_stay_and_can_be_left_out_of_checkpoints(tiny, tmp_path):
    def frozen_task() -> TrainingTask:
        task = tiny.make_task()
        task.model.get_submodule("layers.0").requires_grad_(False)
        return replace(task, save_frozen=False)

    task = frozen_task()
    before = task.model.get_parameter("layers.0.weight").detach().clone()
    result = run(task, tiny.make_settings(max_steps=20), tmp_path / "a", tiny.SEED)
    assert torch.equal(weights(result)["layers.0.weight"], before)
    checkpoint = tmp_path / "a" / "checkpoints" / "checkpoint-16"
    saved = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert "layers.0.weight" not in saved
    assert "layers.4.running_mean" in saved
    resumed = run(frozen_task(), tiny.make_settings(max_steps=20), tmp_path / "b", tiny.SEED, resume=checkpoint)
    assert resumed.history == result.history
    assert_same_weights(resumed, result)


def test_tied_parameters_are_saved_once_and_resumed(tiny, tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> ModelOutput:
            return ModelOutput(loss=((self.second(self.first(x)).mean(1) - y) ** 2).mean())

    settings = tiny.make_settings(max_steps=20)
    whole = run(TrainingTask(Tied(), tiny.NoisyLine()), settings, tmp_path / "a", 0)
    checkpoint = tmp_path / "a" / "checkpoints" / "checkpoint-16"
    resumed = run(TrainingTask(Tied(), tiny.NoisyLine()), settings, tmp_path / "b", 0, resume=checkpoint)
    assert resumed.history == whole.history


def test_save_and_after_training_hooks(tiny, tmp_path):
    task = tiny.make_task()

    def calibrate(model: nn.Module, output: Path) -> None:
        assert not model.training
        (output / "calibration.txt").write_text("done")
        model.get_parameter("layers.5.bias").data.fill_(7.0)

    def save(folder: Path) -> None:
        torch.save(task.model.get_parameter("layers.5.bias").detach(), folder / "bias.pt")

    result = run(replace(task, save=save, after_training=calibrate), tiny.make_settings(max_steps=1), tmp_path, 0)
    assert [path.name for path in result.checkpoint.iterdir()] == ["bias.pt"]
    assert torch.load(result.checkpoint / "bias.pt").item() == 7.0
    assert (tmp_path / "calibration.txt").read_text() == "done"


def test_weights_are_kept_when_what_follows_training_fails(tiny, tmp_path):
    task = tiny.make_task()

    def fail(model: nn.Module, output: Path) -> None:
        raise RecipeError("no data to calibrate on")

    save = lambda folder: torch.save(task.model.state_dict(), folder / "weights.pt")  # noqa: E731
    with pytest.raises(RecipeError, match="no data"):
        run(replace(task, save=save, after_training=fail), tiny.make_settings(max_steps=1), tmp_path, 0)
    kept = torch.load(tmp_path / "checkpoint/weights.pt")
    assert all(torch.equal(kept[key], value) for key, value in task.model.state_dict().items())


def test_a_hugging_face_model_is_saved_with_its_config_unchanged(tiny, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    class Pairs(SeededDataset):
        def __len__(self) -> int:
            return 32

        def sample(self, index, random):
            tokens = torch.randint(3, 30, (6,), generator=random.torch)
            return {"input_ids": tokens, "labels": tokens}

    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, use_cache=True)
    config.decoder_start_token_id = 0
    torch.manual_seed(0)
    task = TrainingTask(T5ForConditionalGeneration(config), Pairs())
    result = run(task, tiny.make_settings(max_steps=4, precision="bf16"), tmp_path, 0)
    loaded = T5ForConditionalGeneration.from_pretrained(result.checkpoint)
    assert loaded.config.use_cache is True
    assert loaded.dtype == torch.float32
    for name, tensor in task.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.cpu()), name


def test_bf16_trains_like_fp32_within_its_precision(tiny, tmp_path):
    def losses(precision: str) -> list[float]:
        settings = tiny.make_settings(max_steps=12, precision=precision, save_every=0)
        task = TrainingTask(Linear(), tiny.NoisyLine())
        return [entry["loss"] for entry in run(task, settings, tmp_path / precision, 0).history]

    full, half = losses("fp32"), losses("bf16")
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_precision():
    assert resolve_precision("fp32") == "fp32"
    assert resolve_precision("auto") in ("fp32", "bf16")


class Diverging(nn.Module):
    """Its loss is finite for `good` calls; then the loss, or only the gradient, is not."""

    def __init__(self, good: int, loss_too: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.good, self.loss_too, self.calls = good, loss_too, 0

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> ModelOutput:
        self.calls += 1
        loss = self.weight.square().sum() + 0 * x.sum()
        if self.calls > self.good:
            # sqrt has an infinite slope at 0; times 0 that is NaN, while the value stays finite
            loss = loss + (torch.log(-self.weight.sum()) if self.loss_too else torch.sqrt(0 * self.weight).sum())
        return ModelOutput(loss=loss, losses={"main": loss})


@pytest.mark.parametrize(("loss_too", "what"), [(True, "The loss is nan"), (False, "The gradient norm is nan")])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run(tiny, tmp_path, loss_too, what):
    task = TrainingTask(Diverging(5, loss_too), tiny.NoisyLine())
    settings = tiny.make_settings(max_steps=8, save_every=2)
    with pytest.raises(RecipeError, match=r"at step 6.*lower training\.learning_rate.*checkpoint-4") as caught:
        run(task, settings, tmp_path, 0)
    if not torch.cuda.is_available():  # there the first check is the one of the weights, before a checkpoint
        assert what in str(caught.value)
    assert not (tmp_path / "checkpoint").exists()
    for path in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in safetensors.torch.load_file(path).values())


def test_weights_that_overflow_are_never_saved(tiny, tmp_path):
    """A finite gradient and a learning rate so high that the step itself overflows: only the weights tell."""

    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), -3e38))

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> ModelOutput:
            return ModelOutput(loss=(self.weight * 1e-38).sum() + 0 * x.sum())

    settings = tiny.make_settings(max_steps=1, learning_rate=3e38, warmup_steps=0, weight_decay=0.0)
    with pytest.raises(RecipeError, match="parameter weight became NaN or infinite at step 1"):
        run(TrainingTask(Huge(), tiny.NoisyLine()), settings, tmp_path, 0)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_epochs_and_max_steps_whichever_ends_first(tiny, tmp_path):
    def steps(name: str, **settings: object) -> int:
        return run(tiny.make_task(), tiny.make_settings(save_every=0, **settings), tmp_path / name, 0).steps

    assert steps("a", max_steps=None, epochs=1.5) == 18
    assert steps("b", max_steps=5, epochs=1) == 5
    assert steps("c", max_steps=50, epochs=1) == 12


def test_too_little_data_and_nothing_to_train(tiny, tmp_path):
    task = replace(tiny.make_task(), train_dataset=tiny.NoisyLine(5))
    with pytest.raises(RecipeError, match=r"5 training samples are fewer than training.batch_size \(8\)"):
        run(task, tiny.make_settings(), tmp_path, 0)
    task.model.requires_grad_(False)
    with pytest.raises(RecipeError, match="No parameter of the model is trainable"):
        run(task, tiny.make_settings(), tmp_path, 0)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self):
        for index in range(self.length):
            yield {"x": torch.full((8,), index / 100), "y": torch.tensor(index / 100)}


def test_an_endless_stream_trains_and_resumes(tiny, tmp_path):
    def task(length: int = 10**9) -> TrainingTask:
        return replace(tiny.make_task(), train_dataset=Stream(length))

    settings = tiny.make_settings(max_steps=12, save_every=5)
    whole = run(task(), settings, tmp_path / "a", tiny.SEED)
    start = tmp_path / "a" / "checkpoints" / "checkpoint-10"
    resumed = run(task(), settings, tmp_path / "b", tiny.SEED, resume=start)
    assert resumed.history == whole.history
    with pytest.raises(RecipeError, match="ended after 2 of 12 steps"):
        run(task(16), settings, tmp_path / "c", tiny.SEED)
    with pytest.raises(RecipeError, match=r"give training\.max_steps"):
        run(task(), tiny.make_settings(max_steps=None, epochs=1), tmp_path / "d", tiny.SEED)
