"""The recipe: one object behind YAML files and flags, which names all that is wrong at once."""

import inspect
import typing
from pathlib import Path

import pydantic
import pytest
import yaml
from builders import command
from hypothesis import given
from hypothesis import strategies as st

from askewq import cli, config, contradictions, recipe_files
from askewq.config import Recipe, build
from askewq.errors import RecipeError

ESSENTIALS = {"model": "resnet18", "dataset": "d", "output": "o"}


def parsed(*words: str) -> dict[str, object]:
    """Return what `askewq finetune` reads from the command line, without running it."""
    _, bound, _ = cli.app.parse_args(["finetune", *words], exit_on_error=False, print_error=False)
    return dict(bound.arguments.get("flags", {}))


def finetune_flags() -> set[str]:
    """Return the long flags that the finetune command accepts, as cyclopts lists them."""
    collection = cli.app["finetune"].assemble_argument_collection()
    return {name for argument in collection for name in argument.names if name.startswith("--")}


class TestFlags:
    def test_every_recipe_key_is_a_flag(self):
        """Each key of a recipe can be given on the command line under the same name."""
        wanted = {f"--{key.replace('_', '-')}" for key in Recipe.model_fields}
        assert wanted <= finetune_flags()

    def test_help_has_every_default(self):
        """Also those that equal False or True, such as 0 steps."""
        flags = {a.name: a for a in cli.app["finetune"].assemble_argument_collection()}
        for key, field in Recipe.model_fields.items():
            told = f"[default: {field.default}]"
            switch_or_open = isinstance(field.default, bool) or field.default in (None, ())
            listed = told in (flags[f"--{key.replace('_', '-')}"].parameter.help or "")
            assert listed == (not field.is_required() and not switch_or_open), key

    def test_every_flag_is_a_recipe_key(self):
        """The command takes no setting that a recipe cannot hold, but it and what starts runs."""
        names = {flag.removeprefix("--") for flag in finetune_flags()}
        keys = {key.replace("_", "-") for key in Recipe.model_fields}
        negatives = {f"no-{key}" for key in keys}
        assert names - keys - negatives == {"recipe", "num-processes"}

    def test_only_booleans_have_a_negative_flag(self):
        """--no-x exists for exactly the keys that are true or false."""
        booleans = {k for k, field in Recipe.model_fields.items() if field.annotation is bool}
        negatives = {f for f in finetune_flags() if f.startswith("--no-")}
        assert negatives == {f"--no-{key.replace('_', '-')}" for key in booleans}

    @pytest.mark.parametrize(
        ("words", "values"),
        [
            (["--bits", "2"], {"bits": 2}),
            (["--bits", "ternary"], {"bits": "ternary"}),
            (["--group-size", "64"], {"group_size": 64}),
            (["--group-size", "channel"], {"group_size": "channel"}),
            (["--lr", "1e-3"], {"lr": 1e-3}),
            (["--no-pretrained"], {"pretrained": False}),
            (["--include", "a.*", "--include", "b"], {"include": ("a.*", "b")}),
            (["--text-columns", "one", "two"], {"text_columns": ("one", "two")}),
            (["--mean", "0.5", "0.4", "0.3"], {"mean": (0.5, 0.4, 0.3)}),
            (["--weights", "w.safetensors"], {"weights": Path("w.safetensors")}),
            (["--epochs", "2"], {"epochs": 2.0}),
            ([], {}),
        ],
        ids=lambda case: " ".join(case) if isinstance(case, list) else "",
    )
    def test_flag_values_have_the_type_of_the_key(self, words, values):
        """A flag arrives as the value that the recipe holds, and flags not given do not occur."""
        assert parsed(*words) == values

    def test_every_key_has_a_help_line_and_a_group(self):
        """Each key says what it is for and where --help lists it."""
        for key, field in Recipe.model_fields.items():
            assert field.description, key
            assert isinstance(field.json_schema_extra, dict), key
            assert field.json_schema_extra["group"], key

    @pytest.mark.parametrize("flags", [cli._InspectFlags, cli._EvalFlags])
    def test_other_commands_share_the_keys_of_the_recipe(self, flags):
        """The flags of eval and inspect are recipe keys with the recipe's own types."""
        for key, annotation in typing.get_type_hints(flags).items():
            assert annotation == Recipe.model_fields[key].annotation

    def test_the_sources_write_no_flag_by_hand(self):
        """The finetune command has the generated flags, the recipe, and in how many processes."""
        parameters = set(inspect.signature(cli.finetune).parameters)
        assert parameters == {"recipe", "num_processes", "flags"}


class TestMerging:
    @pytest.fixture
    def seen(self, monkeypatch):
        """Catch the recipe that the command line hands to the training run."""
        from askewq import train

        recipes = []
        monkeypatch.setattr(train, "finetune", recipes.append)
        return recipes

    def test_flags_win_over_the_recipe(self, tmp_path, seen):
        """A key given both ways has the value of the flag; the others come from the file."""
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({**ESSENTIALS, "bits": 3, "lr": 0.5, "seed": 4}))
        command("finetune", "--recipe", path, "--bits", 4, "--model", "resnet50")
        (recipe,) = seen
        assert recipe == build({**ESSENTIALS, "bits": 4, "lr": 0.5, "seed": 4, "model": "resnet50"})

    def test_a_flag_can_restore_a_default(self, tmp_path, seen):
        """A flag with the default value still wins over the recipe's value."""
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({**ESSENTIALS, "bits": 3, "pretrained": False}))
        command("finetune", "--recipe", path, "--bits", 2, "--pretrained")
        assert (seen[0].bits, seen[0].pretrained) == (2, True)

    def test_flags_alone_suffice(self, seen):
        """The command of the README needs model, bits, data set and output only."""
        words = ["--model", "resnet50", "--bits", 2, "--dataset", "D", "--output", "out"]
        command("finetune", *words)
        assert seen == [build({"model": "resnet50", "bits": 2, "dataset": "D", "output": "out"})]

    def test_no_resume_is_an_ordinary_start(self, tmp_path, seen):
        """--no-resume means the default, so no earlier run is asked for."""
        words = ["--model", "m", "--dataset", "D", "--output", tmp_path / "new", "--no-resume"]
        command("finetune", *words)
        assert seen[0].resume is False


class TestRecipeFiles:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"bits": "ternary", "include": ("layer1.*", "fc"), "exclude": ("*.conv2",)},
            {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0), "group_size": 64},
            {
                "weights": "w.safetensors",
                "text_columns": ["a", "ä"],
                "lr": 3e-4,
                "task": "causal-lm",
            },
            {"alpha": 7.0, "pull": "coupled", "closing": "single", "close_power": 1.5},
        ],
    )
    def test_reads_back_what_was_written(self, tmp_path, changes):
        """A recipe written as YAML and read again equals the recipe."""
        recipe = build({**ESSENTIALS, **changes})
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe_files.to_yaml(recipe), encoding="utf-8")
        assert build(recipe_files.read_yaml(path)) == recipe

    @given(
        lr=st.floats(1e-300, 1e300),
        bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, "ternary"]),
        model=st.text(min_size=1).filter(lambda text: text.isprintable()),
        include=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C"]))),
    )
    def test_round_trip_of_any_value(self, lr, bits, model, include):
        """No text and no number changes on its way through YAML."""
        recipe = build({**ESSENTIALS, "lr": lr, "bits": bits, "model": model, "include": include})
        assert build(yaml.safe_load(recipe_files.to_yaml(recipe))) == recipe

    def test_written_recipe_has_every_key(self):
        """The file says every setting, in the order in which the class lists them."""
        content = yaml.safe_load(recipe_files.to_yaml(build(ESSENTIALS)))
        assert list(content) == list(Recipe.model_fields)

    def test_a_recipe_cannot_be_changed(self):
        """A recipe is a value: assigning to a key raises."""
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            build(ESSENTIALS).bits = 3

    @pytest.mark.parametrize("name", sorted(recipe_files.shipped_recipes()))
    def test_shipped_recipes_are_valid(self, name):
        """Each recipe that comes with askewq is one, once it is told where to write."""
        path = recipe_files.shipped_recipes()[name]
        recipe = build({**recipe_files.read_yaml(path), "output": "out"}, name)
        first, *others = path.read_text(encoding="utf-8").splitlines()
        assert first.startswith("# ")
        assert any(f"askewq finetune --recipe {name}" in line for line in others)
        assert recipe.output == Path("out")

    def test_a_mapping_may_be_merged(self, tmp_path):
        """As YAML has it, without counting as a key that is there twice."""
        path = tmp_path / "r.yaml"
        path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
        assert recipe_files.read_yaml(path)["b"] == {"x": 1, "y": 3}

    def test_recipes_are_shipped(self):
        """There is at least one recipe to start from."""
        assert recipe_files.shipped_recipes()

    def test_finds_a_recipe_by_name_and_by_path(self, tmp_path):
        """A shipped recipe is found by its name, any other by its path."""
        name, path = next(iter(recipe_files.shipped_recipes().items()))
        own = tmp_path / "own.yaml"
        own.write_text("bits: 2\n")
        assert recipe_files.find_recipe(name) == path
        assert recipe_files.find_recipe(str(own)) == own

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"- a\n- b\n", "must be a mapping"),
            (b"", "must be a mapping"),
            (b"a: [1", "cannot be read"),
            (b"bits: 2\nlr: 1\nbits: 4\n", "bits is given twice"),
            (b"\xff\xfe\x00x", "cannot be read"),
            (b"!!python/object/apply:os.system [exit]", "cannot be read"),
        ],
        ids=["list", "empty", "broken", "twice", "binary", "code"],
    )
    def test_refuses_files_that_are_no_recipe(self, tmp_path, content, message):
        """A file that is not a YAML mapping is refused with its name, and runs nothing."""
        path = tmp_path / "r.yaml"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=message) as caught:
            recipe_files.read_yaml(path)
        assert str(path) in str(caught.value)

    def test_a_missing_file_is_named(self, tmp_path):
        """A recipe that is not there is an error with its path."""
        with pytest.raises(RecipeError, match=r"nowhere\.yaml"):
            recipe_files.read_yaml(tmp_path / "nowhere.yaml")

    def test_an_unknown_name_lists_the_near_and_the_known_ones(self):
        """A misspelt recipe name gets the near name and the whole list."""
        name = next(iter(recipe_files.shipped_recipes()))
        with pytest.raises(RecipeError, match="did you mean") as caught:
            recipe_files.find_recipe(name[:-1] + "x")
        assert all(known in str(caught.value) for known in recipe_files.shipped_recipes())


class TestWrongValues:
    def test_unknown_key_gets_near_names(self):
        """A misspelt key is named together with what it may have meant."""
        with pytest.raises(RecipeError, match=r"bitz: no such key \(did you mean bits\?\)"):
            build({**ESSENTIALS, "bitz": 3})

    def test_in_python_as_on_the_command_line(self):
        """A Recipe that is made directly has the same errors, askewq's own."""
        wanted = r"(?s)the settings cannot be used:.* bits: .* not 9.* bitz: no such key"
        with pytest.raises(RecipeError, match=wanted):
            Recipe(**ESSENTIALS, bits=9, bitz=3)
        with pytest.raises(RecipeError, match="epochs does not go with max_steps"):
            Recipe(**ESSENTIALS, epochs=3, max_steps=5)

    def test_all_errors_come_in_one_message(self):
        """Unknown keys, missing keys and wrong values are listed together, one a line."""
        with pytest.raises(RecipeError) as caught:
            build({"model": "m", "dataset": "d", "bits": 9, "lr": -1, "optimiser": "sgd"}, "r.yaml")
        lines = str(caught.value).splitlines()
        assert lines[0] == "r.yaml cannot be used:"
        for key in ("bits", "lr", "optimiser", "output"):
            assert sum(line.strip().startswith(f"{key}: ") for line in lines[1:]) == 1
        assert "did you mean optimizer" in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"bits": 0}, "bits"),
            ({"bits": 9}, "bits"),
            ({"bits": "x"}, "bits"),
            ({"bits": None}, "bits"),
            ({"bits": True}, "bits"),
            ({"act_bits": True}, "act_bits"),
            ({"group_size": True}, "group_size"),
            ({"max_steps": True}, "max_steps"),
            ({"distill": True}, "distill"),
            ({"seed": False}, "seed"),
            ({"mean": [True, False, False]}, "mean"),
            ({"bits": [2]}, "bits"),
            ({"lr": 0}, "lr"),
            ({"lr": "fast"}, "lr"),
            ({"lr": float("nan")}, "lr"),
            ({"lr": float("inf")}, "lr"),
            ({"lr_hold": 1.0}, "lr_hold"),
            ({"momentum": 1.0}, "momentum"),
            ({"weight_decay": -0.1}, "weight_decay"),
            ({"epochs": 0}, "epochs"),
            ({"epochs": float("inf")}, "epochs"),
            ({"max_steps": 0}, "max_steps"),
            ({"batch_size": 0}, "batch_size"),
            ({"batch_size": 2.5}, "batch_size"),
            ({"grad_accumulation": 0}, "grad_accumulation"),
            ({"final_radius": 0.5}, "final_radius"),
            ({"final_radius": 0.0}, "final_radius"),
            ({"close_power": 0}, "close_power"),
            ({"close_every": 0}, "close_every"),
            ({"clip": 0}, "clip"),
            ({"alpha": 0}, "alpha"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**32}, "seed"),
            ({"task": "segmentation"}, "task"),
            ({"grid": "quarter"}, "grid"),
            ({"optimizer": "lion"}, "optimizer"),
            ({"mixed_precision": "fp16"}, "mixed_precision"),
            ({"report_to": "mail"}, "report_to"),
            ({"augment": "rotate"}, "augment"),
            ({"closing": "none"}, "closing"),
            ({"pull": "push"}, "pull"),
            ({"group_size": "row"}, "group_size"),
            ({"image_size": 0}, "image_size"),
            ({"max_length": 1}, "max_length"),
            ({"include": 3}, "include"),
        ],
        ids=str,
    )
    def test_each_value_out_of_range_is_named_with_what_was_given(self, changes, named):
        """A wrong value is refused; the message has the key and the value."""
        with pytest.raises(RecipeError) as caught:
            build({**ESSENTIALS, **changes})
        value = changes[named]
        for line in str(caught.value).splitlines()[1:]:
            assert line.strip().startswith(f"{named}: ")
            assert line.endswith(f"not {value!r}")

    @pytest.mark.parametrize(
        ("line", "key", "value"),
        [
            ("mixed_precision: no", "mixed_precision", "no"),
            ("mixed_precision: bf16", "mixed_precision", "bf16"),
            ("include: conv1", "include", ("conv1",)),
            ("text_columns: [a, b]", "text_columns", ("a", "b")),
            ("bits_override: fc=8", "bits_override", ("fc=8",)),
        ],
    )
    def test_yaml_as_one_writes_it(self, line, key, value):
        """An unquoted no is the word, one pattern a list of one."""
        assert getattr(build({**ESSENTIALS, **yaml.safe_load(line)}), key) == value

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"close_start": 0.9, "close_end": 0.9}, ["close_start", "close_end"]),
            ({"alpha": 1.5}, ["alpha", "decoupled", "coupled"]),
            ({"resume": True, "overwrite": True}, ["resume", "overwrite"]),
        ],
        ids=["closing", "alpha", "output"],
    )
    def test_combinations_that_contradict_are_refused(self, changes, words):
        """Settings that exclude each other are named together."""
        with pytest.raises(RecipeError) as caught:
            build({**ESSENTIALS, **changes})
        assert all(word in str(caught.value) for word in words)

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"momentum": 0.5, "optimizer": "adamw"}, "momentum"),
            ({"close_every": 5, "closing": "single"}, "close_every"),
            ({"final_radius": 0.1, "closing": "staggered"}, "final_radius"),
            ({"alpha": 0.2, "method": "lsq"}, "alpha"),
            ({"strength": 2.0}, "strength"),
            ({"gradient_bits": 4}, "gradient_bits"),
            ({"method": "lsq", "close_every": 7}, "close_every"),
            ({"method": "lsq", "final_radius": 0.1}, "final_radius"),
            ({"temperature": 3.0}, "temperature"),
            ({"temperature": 3.0, "distill_hidden": 1.0}, "temperature"),
            ({"teacher": "self"}, "teacher"),
            ({"teacher_weights": "w.safetensors"}, "teacher_weights"),
            ({"tokenizer": "t", "task": "image-classification"}, "tokenizer"),
            ({"augment": "crop", "task": "text-classification"}, "augment"),
            ({"label_column": "l", "task": "causal-lm"}, "label_column"),
            ({"full_precision_lr": 0.1}, "full_precision_lr"),
        ],
    )
    def test_settings_that_would_decide_nothing_are_refused(self, changes, key):
        """A setting of another optimizer, closing or task is named instead of ignored."""
        with pytest.raises(RecipeError, match=f"{key} goes with .*leave"):
            build({**ESSENTIALS, **changes})

    def test_open_choices_are_not_held_against_a_setting(self):
        """What the model decides later is checked later, by `check`."""
        recipe = build({**ESSENTIALS, "momentum": 0.5, "max_length": 9})
        config.check(recipe.model_copy(update={"optimizer": "sgd", "task": "causal-lm"}))
        with pytest.raises(RecipeError, match="momentum"):
            config.check(recipe.model_copy(update={"optimizer": "adamw"}))

    def test_the_papers_alpha_is_allowed_when_coupled(self):
        """With the pull coupled to the learning rate alpha may exceed 1."""
        assert build({**ESSENTIALS, "alpha": 5.0, "pull": "coupled"}).alpha == 5.0

    def test_what_shards_cannot_do_is_named_at_once(self):
        """Every setting that FSDP2 refuses is in one answer; a plain recipe has none of them."""
        settings = {"compile": True, "average": 0.9, "polish_steps": 4, "act_bits": 4}
        named = contradictions.unshardable(build({**ESSENTIALS, **settings, "distill_hidden": 1.0}))
        assert sorted(complaint.split(" = ")[0] for complaint in named) == sorted(
            [*settings, "distill_hidden"]
        )
        assert contradictions.unshardable(build(ESSENTIALS)) == []


class TestOverrides:
    def test_are_patterns_with_bits(self):
        """The last "=" parts a pattern from its width."""
        made = config.build(
            {**ESSENTIALS, "bits_override": ["layer4.*=4", "a=b=ternary", "fc=1", "fc=1"]}
        )
        assert made.overrides == {"layer4.*": 4, "a=b": "ternary", "fc": 1}

    @pytest.mark.parametrize(
        "text", ["fc", "=4", "fc=", "fc=9", "fc=0", "fc=2.0", "fc= 2", "fc=two"]
    )
    def test_other_texts(self, text):
        """What is no pattern with a width is quoted, with the widths that there are."""
        with pytest.raises(RecipeError) as error:
            config.build({**ESSENTIALS, "bits_override": ["conv1=4", text]})
        message = str(error.value)
        assert f"bits_override: {text!r} must be PATTERN=B with B one of 1, 2, 3" in message

    def test_two_widths_of_one_pattern(self):
        """A contradiction is found before any model is."""
        with pytest.raises(RecipeError, match="gives 'fc' both 4 and 8 bits"):
            config.build({**ESSENTIALS, "bits_override": ["fc=4", "fc=8"]})


def test_a_home_is_resolved_wherever_a_path_may_be(monkeypatch):
    """No folder called ~ is made; a factory in a file keeps its name."""
    monkeypatch.setenv("HOME", "/home/me")
    given = {"model": "~/net.py:make", "dataset": "~/d", "output": "~/o", "weights": "~/w"}
    made = config.build({**given, "distill": 0.5, "teacher": "~/t", "teacher_weights": "~/tw"})
    paths = (made.model, made.dataset, made.output, made.weights, made.teacher)
    assert [str(path) for path in (*paths, made.teacher_weights)] == [
        f"/home/me/{name}" for name in ("net.py:make", "d", "o", "w", "t", "tw")
    ]
    with pytest.raises(RecipeError, match=r"output.*home"):
        config.build({**given, "output": "~nobody-of-this-name/o"})
