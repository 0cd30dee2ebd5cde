from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import RecipeError
from foveate.training.recipes import Recipe, RecipePath, RecipeSection, TrainingSettings, load_recipe

MINIMAL = "method: example\ntraining: {max_steps: 10}\n"


class Source(RecipeSection):
    root: RecipePath = Path("data/world")
    limit: int | None = 100


class Data(RecipeSection):
    train: Source = Source()
    views: tuple[float, ...] = (0.0,)


class ExampleRecipe(Recipe):
    data: Data = Data()


def load(folder: Path, text: str, *overrides: str) -> ExampleRecipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    recipe = load_recipe(path, overrides, ExampleRecipe)
    assert isinstance(recipe, ExampleRecipe)
    return recipe


def error_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert (recipe.method, recipe.seed, recipe.output) == ("example", 0, Path("out"))
    assert recipe.training.max_steps == 10
    assert recipe.training.betas == (0.9, 0.999)


def test_overrides_are_yaml_scalars_lists_and_null(tmp_path):
    recipe = load(
        tmp_path,
        MINIMAL,
        "training.max_steps=200",
        "training.learning_rate=1e-3",
        "training.betas=[0.9, 0.95]",
        "training.progress=false",
        "data.views=[0, 0.3]",
        "data.train.limit=null",
        "data.train.root=a=b",
    )
    assert recipe.training.max_steps == 200
    assert recipe.training.learning_rate == 0.001
    assert recipe.training.betas == (0.9, 0.95)
    assert recipe.training.progress is False
    assert recipe.data.views == (0.0, 0.3)
    assert recipe.data.train == Source(root=Path("a=b"), limit=None)


def test_a_later_override_wins_and_a_whole_section_may_be_given(tmp_path):
    recipe = load(tmp_path, MINIMAL, "training={epochs: 2}", "training.epochs=3")
    assert (recipe.training.epochs, recipe.training.max_steps) == (3, None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_stepz=3", "unknown key 'training.max_stepz'; did you mean 'training.max_steps'?"),
        ("traning.max_steps=3", "unknown key 'traning'; did you mean 'training'?"),
        ("data.train.limits=3", "unknown key 'data.train.limits'; did you mean 'data.train.limit'?"),
        ("max_steps=3", "unknown key 'max_steps'; did you mean 'training.max_steps'?"),
        ("limit=3", "unknown key 'limit'; did you mean 'data.train.limit'?"),
        ("data.zebra=3", "unknown key 'data.zebra'; valid keys there are train, views."),
    ],
)
def test_unknown_keys_suggest_the_nearest_valid_one(tmp_path, override, expected):
    assert error_of(tmp_path, MINIMAL, override).endswith(expected)


def test_an_unknown_key_is_named_before_the_key_that_it_leaves_missing(tmp_path):
    assert "did you mean 'method'?" in error_of(tmp_path, "methd: example\ntraining: {max_steps: 1}\n")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.max_steps=abc", 'training.max_steps should be a valid integer, but it is "abc".'),
        ("training.max_steps=2.5", "training.max_steps should be a valid integer, but it is 2.5."),
        ("training.max_steps='3'", 'training.max_steps should be a valid integer, but it is "3".'),
        ("training.batch_size=true", "training.batch_size should be a valid integer, but it is true."),
        ("training.batch_size=0", "training.batch_size should be greater than 0, but it is 0."),
        ("training.learning_rate=.nan", "training.learning_rate should be a finite number, but it is NaN."),
        ("training.schedule=cosin", "'linear', but it is \"cosin\"."),
        ("training.max_steps=null", "give max_steps or epochs, or training would never end."),
        ("training.betas=[0.9, 1]", "training.betas.1 should be less than 1, but it is 1."),
        ("data.views=3", "data.views should be a list, but it is 3."),
        ("data=null", "data should be a mapping, but it is null."),
        ("data.train.limit=2024-01-01", 'data.train.limit should be a valid integer, but it is "2024-01-01".'),
        ("data.train.root=$FOVEATE_UNSET/x", "the environment variable FOVEATE_UNSET of the path $FOVEATE_UNSET/x is"),
        ("seed=-1", "seed should be greater than or equal to 0, but it is -1."),
        ("data.views.0=3", "sets a key inside data.views, which is a list."),
        ("data.views=[", "The value of the override 'data.views=[' is not valid YAML"),
        ("training.max_steps", "is not of the form section.key=value"),
        ("=3", "is not of the form section.key=value"),
        ("training..epochs=3", "is not of the form section.key=value"),
        ("training" + ".a" * 150 + "=3", "unknown key 'training.a'"),
        ("training" + ".a" * 3000 + "=3", "nested too deeply"),
        ("training.epochs=0x1" + "f" * 9000, "give a smaller one"),
        ("training.epochs=1" + "0" * 400, "training.epochs should be"),
        ("training.max_steps=1" + "0" * 400, "training.max_steps should be less than or equal to 1000000000"),
        ("training.epochs=1e300", "training.epochs should be less than or equal to 1000000"),
        (
            "data.train.root=~nobody-of-this-name/x",
            "data.train.root: the path ~nobody-of-this-name/x starts in the home",
        ),
        ('data.train.root="\\uDCFF"', "text that is not Unicode"),
        ("data.train.root=\udcff", "special characters are not allowed"),
    ],
)
def test_wrong_values_and_overrides(tmp_path, override, expected):
    text = MINIMAL + "data: {views: [0]}\n"
    assert expected in error_of(tmp_path, text, override)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- 1\n- 2\n", "holds a list, not a mapping"),
        ("just words", "holds a text, not a mapping"),
        ("a: [1, 2", "is not valid YAML: line 1"),
        ("a: 1\nb: {c\n: :", "is not valid YAML: line"),
        ("method: a\nmethod: b\n", "line 2 gives the key 'method' a second time"),
        ("x: &a [1]\ny: *a\n", "line 2 uses an alias"),
        ("3: 4\n", "line 1 has the key 3, which is not a word"),
        ("[" * 5000, "nested too deeply"),
        ("x: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("a: 1\nx: !!binary aGVsbG8=\n", "line 2 has the tag 'tag:yaml.org,2002:binary'; write the value without it"),
        ("x: !!set {a, b}\n", "has the tag"),
        ("x: !!timestamp 2024-01-01\n", "has the tag"),
        ("x: !!timestamp foo\n", "has the tag"),
        ("x: !!bool foo\n", "has the tag"),
        ("x: !!omap [a: 1]\n", "has the tag"),
        ("!!map {method: example}\n", "has the tag"),
        ("? !!binary YQ==\n: 1\n", "has the tag"),
        ("training: {max_steps: 1}\n", "the key 'method' is missing"),
        ("method: 5\ntraining: {max_steps: 1}\n", "method should be a valid string, but it is 5."),
    ],
)
def test_broken_files(tmp_path, text, expected):
    assert expected in error_of(tmp_path, text)


def test_files_that_are_no_recipe(tmp_path):
    (tmp_path / "world.yaml").write_text(MINIMAL)
    with pytest.raises(RecipeError, match=r"There is no recipe .*wrld\.yaml; did you mean .*world\.yaml"):
        load_recipe(tmp_path / "wrld.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match="not a text file in UTF-8"):
        load_recipe(tmp_path / "binary.yaml")
    (tmp_path / "huge.yaml").write_text("#" * 1_000_001)
    with pytest.raises(RecipeError, match="1,000,001 bytes"):
        load_recipe(tmp_path / "huge.yaml")
    with pytest.raises(RecipeError, match="/dev/zero is not a regular file"):
        load_recipe("/dev/zero")
    with pytest.raises(RecipeError, match="cannot be read: File name too long"):
        load_recipe("x" * 5000)
    with pytest.raises(RecipeError, match="is not the name of a file"):
        load_recipe("a\0b")


def test_the_method_is_looked_up_in_the_registry(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: dynrefr\ntraining: {max_steps: 1}\n")
    with pytest.raises(RecipeError, match=r"no method 'dynrefr'.*dynrefer"):
        load_recipe(path)
    path.write_text("training: {max_steps: 1}\n")
    with pytest.raises(RecipeError, match="the key 'method' is missing"):
        load_recipe(path)


def test_paths_expand_home_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD", "/somewhere")
    recipe = load(tmp_path, MINIMAL, "data.train.root=$WORLD/train", "output=~/runs")
    assert recipe.data.train.root == Path("/somewhere/train")
    assert recipe.output == Path.home() / "runs"


@settings(deadline=None)
@given(
    st.builds(
        TrainingSettings,
        max_steps=st.integers(1, 10**6),
        learning_rate=st.floats(0, 1),
        betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
        schedule=st.sampled_from(["constant", "cosine", "cosine_per_epoch", "linear"]),
        progress=st.booleans(),
    ),
    st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$~"), min_size=1),
)
def test_a_saved_recipe_reads_back_to_an_equal_one(tmp_path_factory, training, name):
    folder = tmp_path_factory.mktemp("saved")
    recipe = ExampleRecipe(method="example", seed=5, training=training, data=Data(train=Source(root=Path(name))))
    path = recipe.save(folder)
    assert path == folder / "recipe.yaml"
    assert load_recipe(path, (), ExampleRecipe) == recipe
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["training"]["schedule"] == training.schedule
