"""Data sets: splits, columns, labels, preprocessing and the batches that come out."""

import errno
import io
import json
import re
import shutil
from types import SimpleNamespace

import builders
import datasets
import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from askewq import batches, hf_models, models
from askewq.batches import augment, loaders, prepare_batch
from askewq.columns import Columns
from askewq.config import build
from askewq.data import open_data, open_eval
from askewq.errors import DataError, DiskFullError, FormatError, RecipeError
from askewq.preprocessing import ImagePreprocessing

IMAGES, TEXTS, LM = "image-classification", "text-classification", "causal-lm"
PICTURES = builders.pictures(6)


def recipe(dataset, **changes):
    """Return a recipe that reads a data set."""
    return build({"model": "m", "dataset": str(dataset), "output": "o", **changes})


def opened(dataset, task, **changes):
    """Open a data set for a task."""
    return open_data(recipe(dataset, **changes), task)


def tokenizer():
    """Return the tiny tokenizer of whole words."""
    return hf_models.load_tokenizer(str(builders.bert()), trust_remote_code=False)


def write_csv(folder, header, **splits):
    """Write a csv file a split."""
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


class TestSources:
    def test_image_parquet(self):
        """Parquet with an Image and a ClassLabel column needs no column flags."""
        found = opened(builders.image_parquet(), IMAGES)
        assert (len(found.train), len(found.eval)) == (48, 24)
        assert found.columns == Columns(("image",), "label")
        assert found.labels == ("red", "green", "blue")

    def test_image_folder(self):
        """A folder of one folder a class has its classes sorted by name."""
        found = opened(builders.image_folder(), IMAGES)
        assert (len(found.train), len(found.eval)) == (24, 12)
        assert found.labels == ("blue", "green", "red")

    def test_csv_of_words(self):
        """Text columns and labels that are words are found without flags."""
        found = opened(builders.text_csv(), TEXTS)
        assert found.columns == Columns(("sentence",), "label")
        assert found.labels == ("neg", "pos")

    def test_json_of_pairs(self):
        """Two text columns are a pair; numbers as labels keep their order."""
        found = opened(builders.text_pairs_json(), TEXTS)
        assert found.columns == Columns(("premise", "hypothesis"), "label")
        assert found.labels == ("0", "1", "2")

    def test_plain_text(self):
        """A text file is a corpus: one column, no label."""
        found = opened(builders.corpus(), LM)
        assert found.columns == Columns(("text",), None, corpus=True)
        assert found.labels == ()

    @pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "txt"])
    def test_single_files(self, tmp_path, suffix):
        """A file of each type is a data set with one split, which slices divide."""
        import datasets

        path = tmp_path / f"d.{suffix}"
        rows = {"text": [f"good film {i}" for i in range(10)], "label": [0, 1] * 5}
        if suffix == "parquet":
            datasets.Dataset.from_dict(rows).to_parquet(path)
        elif suffix in ("json", "jsonl"):
            lines = [
                json.dumps({"text": t, "label": y}) for t, y in zip(*rows.values(), strict=True)
            ]
            path.write_text("\n".join(lines) + "\n")
        elif suffix == "txt":
            path.write_text("\n".join(rows["text"]) + "\n")
        else:
            comma = "\t" if suffix == "tsv" else ","
            lines = [f"{t}{comma}{y}" for t, y in zip(*rows.values(), strict=True)]
            path.write_text("\n".join([f"text{comma}label", *lines]) + "\n")
        task = LM if suffix == "txt" else TEXTS
        found = opened(path, task, train_split="train[:80%]", eval_split="train[80%:]")
        assert list(found.train["text"]) == rows["text"][:8]
        assert list(found.eval["text"]) == rows["text"][8:]

    def test_labels_that_are_numbers_sort_as_numbers(self, tmp_path):
        """Class 10 comes after class 9."""
        rows = [f"good film,{i}" for i in range(11)]
        folder = write_csv(tmp_path / "d", "text,label", train=rows, test=rows)
        assert opened(folder, TEXTS).labels == tuple(map(str, range(11)))

    @pytest.mark.parametrize("name", ["./nowhere", "nowhere.csv", "/nowhere/at/all"])
    def test_local_paths_that_are_not_there(self, name):
        """A path that looks local is not looked up on the Hub."""
        with pytest.raises(DataError, match="no such file or folder"):
            opened(name, TEXTS)

    def test_the_hub_is_out_of_reach(self):
        """A Hub id without a Hub is an error that says what works offline."""
        with pytest.raises(DataError, match=r"'org/name' .*\n.*local folder or file"):
            opened("org/name", TEXTS)

    def test_other_types_of_file(self, tmp_path):
        """A file of another type is refused with the types that are read."""
        (tmp_path / "d.xlsx").write_text("x")
        with pytest.raises(DataError, match=r"\.parquet, \.csv"):
            opened(tmp_path / "d.xlsx", TEXTS)

    def test_a_configuration_of_a_file(self):
        """A file has none, so that the name would decide nothing."""
        with pytest.raises(
            DataError, match=r"'other': the file .* has no configurations; leave it"
        ):
            opened(builders.text_csv() / "train.csv", TEXTS, dataset_config="other")

    @pytest.mark.parametrize("suffix", ["parquet", "json", "csv"])
    def test_damaged_files(self, tmp_path, suffix):
        """A file that cannot be parsed is refused with its path."""
        path = tmp_path / f"d.{suffix}"
        path.write_bytes(b'{"a": [1, \x00\xff "b,c\n1,2,3,"\n')
        with pytest.raises(DataError) as caught:
            opened(path, TEXTS)
        assert str(path) in str(caught.value)

    def test_files_with_other_columns(self, tmp_path):
        """The columns that differ are named."""
        write_csv(tmp_path, "text,label", train=["fine,1", "bad,0"])
        write_csv(tmp_path, "sentence,label", test=["fine,1"])
        with pytest.raises(DataError, match=r"not have the same columns.*'sentence'.*'text'"):
            opened(tmp_path, TEXTS)

    def test_a_broken_line_beside_a_stream(self, tmp_path):
        """The evaluation split is read at once, and what is broken there is said as elsewhere."""
        (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 3)
        (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{broken\n')
        with pytest.raises(DataError, match=r"cannot be read: .*JSON parse error"):
            opened(tmp_path, LM, streaming=True, max_steps=1)

    def test_no_room_for_the_copy(self, tmp_path, monkeypatch):
        """A disk that is full while datasets fills its cache: which folder, and how to move it."""
        import datasets

        def full(*_args, **_keys):
            raise datasets.exceptions.DatasetGenerationError("x") from OSError(
                errno.ENOSPC, "No space left on device"
            )

        monkeypatch.setattr(datasets, "load_dataset", full)
        with pytest.raises(DiskFullError, match=r"No space left.*cache.*HF_DATASETS_CACHE"):
            opened(builders.image_parquet(), IMAGES)

    def test_an_empty_folder(self, tmp_path):
        """A folder without data is refused."""
        with pytest.raises(DataError, match="cannot be read"):
            opened(tmp_path, TEXTS)


class TestSplits:
    ROWS = ("good film,0", "bad film,1")

    @pytest.mark.parametrize(
        ("present", "chosen"),
        [(("validation", "test"), "validation"), (("test",), "test")],
    )
    def test_evaluation_defaults_to_validation_then_test(self, tmp_path, present, chosen):
        """The validation split is taken where there is one."""
        splits = {split: [f"{split} film,0", "bad film,1"] for split in ("train", *present)}
        found = opened(write_csv(tmp_path / "d", "text,label", **splits), TEXTS)
        assert found.eval["text"][0] == f"{chosen} film"

    def test_neither_is_an_error_that_shows_how_to_split(self, tmp_path):
        """With a train split alone, the message lists it and shows slices."""
        folder = write_csv(tmp_path / "d", "text,label", train=self.ROWS)
        with pytest.raises(DataError, match=r"it has train.*train\[:90%\]"):
            opened(folder, TEXTS)

    @pytest.mark.parametrize("flag", ["train_split", "eval_split"])
    def test_a_missing_split_names_those_there_are(self, flag):
        """A split that is not there is an error with near names and the list."""
        with pytest.raises(DataError, match=r"did you mean train\?.*train, test") as caught:
            opened(builders.image_parquet(), IMAGES, **{flag: "trian[:50%]"})
        assert f"--{flag.replace('_', '-')}" in str(caught.value)

    @pytest.mark.parametrize("name", ["train[abc]", "train[:9", "train[50%:50%]"])
    def test_slices_that_select_nothing(self, name):
        """A slice that cannot be read, or is empty, is refused."""
        with pytest.raises(DataError, match="train"):
            opened(builders.image_parquet(), IMAGES, train_split=name)

    def test_sample_limits(self):
        """A limit takes that many random samples, the same ones for the same seed."""
        limits = {"max_train_samples": 9, "max_eval_samples": 6}
        first = opened(builders.image_folder(), IMAGES, **limits)
        again = opened(builders.image_folder(), IMAGES, **limits)
        other = opened(builders.image_folder(), IMAGES, **limits, seed=1)
        assert (len(first.train), len(first.eval)) == (9, 6)
        assert len(set(first.train["label"])) > 1  # the first nine are all blue
        pixels = [np.stack(list(map(np.array, d.train["image"]))) for d in (first, again, other)]
        assert np.array_equal(pixels[0], pixels[1])
        assert not np.array_equal(pixels[0], pixels[2])
        assert list(first.eval["label"]) == list(other.eval["label"])

    def test_limits_beyond_the_data(self):
        """A limit above the number of samples takes all."""
        assert len(opened(builders.image_parquet(), IMAGES, max_train_samples=1000).train) == 48

    def test_labels_do_not_depend_on_the_sample(self, tmp_path):
        """A class that no sampled row has is still a class."""
        rows = [*["good film,pos"] * 30, "bad film,neg"]
        folder = write_csv(tmp_path / "d", "text,label", train=rows, test=["bad film,neg"])
        assert opened(folder, TEXTS, max_train_samples=2).labels == ("neg", "pos")

    @pytest.mark.parametrize(
        ("train", "evaluation", "shared"),
        [
            ("train", "test", False),
            ("train", "train", True),
            ("train", "train[50%:]", True),
            ("train[:50%]", "train[50%:]", False),
            ("train[:60%]", "train[50%:]", True),
            ("train[:4]", "train[3:5]", True),
            ("train[:4]+test[:1]", "test[1:]", False),
            ("train[:4]+test[:2]", "test[1:]", True),
        ],
    )
    def test_rows_that_are_trained_on_and_judged(self, tmp_path, train, evaluation, shared):
        """A split in both is said to be."""
        rows = ["good film,1", "bad film,0"] * 10
        folder = write_csv(tmp_path / "d", "text,label", train=rows, test=rows)
        found = opened(folder, TEXTS, train_split=train, eval_split=evaluation)
        assert bool(found.notes) == shared
        assert not shared or f"--eval-split {evaluation} has rows of" in found.notes[0]

    @pytest.mark.parametrize("classes", [("car", "train"), ("bullet_train", "test_tube", "cat")])
    @pytest.mark.parametrize("judged", ["test", "val"])
    def test_a_class_called_like_a_split(self, tmp_path, classes, judged):
        """Its images belong to the split whose folder they are in, and to no other."""
        for split in ("train", judged):
            for label in classes:
                (tmp_path / "d" / split / label).mkdir(parents=True)
                PICTURES[0][0].save(tmp_path / "d" / split / label / "0.png")
        found = opened(tmp_path / "d", IMAGES)
        for split, rows in (("train", found.train), (judged, found.eval)):
            paths = rows.cast_column("image", datasets.Image(decode=False))["image"][:]
            told = {path["path"].removeprefix(f"{tmp_path}/d/") for path in paths}
            assert told == {f"{split}/{label}/0.png" for label in classes}
            assert len(paths) == len(classes)
        assert found.labels == tuple(sorted(classes))

    def test_a_file_between_two_splits(self, tmp_path):
        """Where no folder says to which it belongs, nobody is trained on what is judged."""
        rows = {"train": ["a,pos", "b,neg"], "test": ["c,pos", "d,neg"], "train_test": ["e,pos"]}
        folder = write_csv(tmp_path / "d", "text,label", **rows)
        with pytest.raises(DataError, match=r"takes train_test\.csv into the splits .* folders"):
            opened(folder, TEXTS)

    def test_one_label_is_no_choice(self, tmp_path):
        """A classifier with one output is right by definition."""
        folder = write_csv(tmp_path / "d", "text,label", train=["a,pos", "b,pos"], test=["a,pos"])
        with pytest.raises(DataError, match="'label' has the label pos only"):
            opened(folder, TEXTS)


class TestColumns:
    def test_column_flags_win(self, tmp_path):
        """Columns that were named are taken instead of guesses."""
        header = "text1,text2,c,label"
        folder = write_csv(tmp_path / "d", header, train=["1x,2x,3x,0", "1y,2y,3y,1"])
        slices = {"eval_split": "train"}
        guess = opened(folder, TEXTS, **slices)
        assert guess.columns == Columns(("text1", "text2"), "label")
        columns = {"text_columns": ["c", "text1"], "label_column": "text2"}
        named = opened(folder, TEXTS, **columns, **slices)
        assert named.columns == Columns(("c", "text1"), "text2")
        assert named.labels == ("2x", "2y")

    @pytest.mark.parametrize(
        ("header", "task", "inputs"),
        [
            ("id,title,text,label", TEXTS, ("text",)),
            ("title,content,topic,label", TEXTS, ("content",)),
            ("id,premise,hypothesis,label", TEXTS, ("premise", "hypothesis")),
            ("id,blurb,more,label", TEXTS, None),
            ("id,blurb,more,label", LM, None),
            ("id,sentence1,sentence2,label", LM, None),  # two texts are no corpus
            ("id,sentence,more,label", "feature-extraction", ("sentence",)),
        ],
    )
    def test_of_several_texts_the_name_decides(self, tmp_path, header, task, inputs):
        """Where no name says which column holds the texts, the error asks."""
        folder = write_csv(tmp_path / "d", header, train=["a,b,c,0", "a,b,d,1"], test=["d,e,f,0"])
        if inputs is None:
            with pytest.raises(DataError, match="all hold text; say which to read, --text-columns"):
                opened(folder, task)
        else:
            assert opened(folder, task).columns.inputs == inputs

    @pytest.mark.parametrize(
        ("dataset", "task", "flags", "words"),
        [
            ("image_parquet", IMAGES, {"image_column": "img"}, ["--image-column 'img'", "image"]),
            ("image_parquet", IMAGES, {"label_column": "lable"}, ["did you mean label?"]),
            ("text_csv", TEXTS, {"text_columns": ["sentense"]}, ["did you mean sentence?"]),
            (
                "text_csv",
                IMAGES,
                {},
                ["no column looks like an image", "sentence, label", "metadata.csv"],
            ),
            ("image_parquet", TEXTS, {}, ["no column looks like a text", "image, label"]),
            ("corpus", TEXTS, {}, ["no column looks like a label", "text"]),
            ("image_parquet", LM, {}, ["no column looks like a text"]),
            ("image_parquet", IMAGES, {"image_column": "label"}, ["not images", "image"]),
        ],
    )
    def test_what_is_missing_is_named_with_what_there_is(self, dataset, task, flags, words):
        """A column that is not there, or not guessable, lists the columns there are."""
        with pytest.raises(DataError) as caught:
            opened(getattr(builders, dataset)(), task, **flags)
        assert all(word in str(caught.value) for word in words)

    def test_images_in_folders_below_their_class(self, tmp_path):
        """They get no label, and no column could be named."""
        for name in ("train/a/images/0.png", "test/b/images/0.png"):
            (tmp_path / name).parent.mkdir(parents=True)
            PICTURES[0][0].save(tmp_path / name)
        with pytest.raises(DataError, match=r"no labels: put them into the folders train/CLASS"):
            opened(tmp_path, IMAGES)

    @pytest.mark.parametrize(
        ("dataset", "task", "flags"),
        [
            ("image_parquet", IMAGES, {"label_column": "image"}),
            ("text_pairs_json", TEXTS, {"text_columns": ["idx"]}),
            ("image_parquet", LM, {"text_columns": ["image"]}),
        ],
        ids=["label", "text", "corpus"],
    )
    def test_columns_of_another_kind_are_refused(self, dataset, task, flags):
        """A column that exists but cannot serve is refused by name, before any training."""
        source = recipe(getattr(builders, dataset)(), **flags)
        (column,) = flags.values()
        with pytest.raises(DataError, match=column if isinstance(column, str) else column[0]):
            loaders(source, open_data(source, task), tokenizer() if task != IMAGES else plain())


def plain():
    """Return the preprocessing that leaves images as they are."""
    return ImagePreprocessing()


COLOURED = builders.pictures(6)


class TestLabels:
    def ids(self, folder, labels, **changes):
        """Return the label ids of the evaluation split for a model with these labels."""
        found = open_eval(recipe(folder, **changes), TEXTS, labels)
        return batches.label_ids(found.eval, found.columns.label, labels, "--eval-split")

    def test_ids_follow_the_order_of_the_model(self, tmp_path):
        """A label is the index of its name among the model's labels."""
        folder = write_csv(tmp_path / "d", "text,label", train=["x,no"], test=["a,no", "b,yes"])
        assert self.ids(folder, ("yes", "maybe", "no")) == [2, 0]

    def test_class_names_of_another_order(self, tmp_path):
        """Classes are matched by name, not by number, between data sets."""
        content = builders.pictures(6)
        builders.write_images(tmp_path / "test.parquet", content, ["blue", "red", "green"])
        labels = ("red", "green", "blue")
        found = open_eval(recipe(tmp_path), IMAGES, labels)
        assert batches.label_ids(found.eval, "label", labels, "--eval-split") == [2, 0, 1] * 2

    def test_splits_with_class_names_of_two_orders(self, tmp_path):
        """The numbers of both would be read by the names of the first."""
        content = builders.pictures(6)
        builders.write_images(tmp_path / "train.parquet", content, ["red", "green", "blue"])
        builders.write_images(tmp_path / "test.parquet", content, ["blue", "red", "green"])
        words = r"other numbers in .*test.parquet \(blue, red, green\) than in .*train.parquet"
        for streaming in ({}, {"streaming": True, "max_steps": 1}):
            with pytest.raises(DataError, match=words):
                opened(tmp_path, IMAGES, **streaming)
        with pytest.raises(DataError, match=words):
            open_eval(recipe(tmp_path), IMAGES, ("red", "green", "blue"))

    def test_a_class_that_training_has_no_row_of(self, tmp_path):
        """The figures are partly of classes that nothing was learnt of."""
        builders.write_images(tmp_path / "train.parquet", [(p, y % 2) for p, y in PICTURES])
        builders.write_images(tmp_path / "test.parquet", PICTURES)
        (note,) = opened(tmp_path, IMAGES).notes
        assert "2 of 6 rows of --eval-split are of classes that --train-split has no row" in note
        assert note.endswith(": blue")

    def test_unknown_labels_are_listed(self, tmp_path):
        """A label that the model was not made for is named beside those it knows."""
        folder = write_csv(tmp_path / "d", "text,label", train=["x,no"], test=["a,no", "b,perhaps"])
        with pytest.raises(DataError, match=r"perhaps; it knows 2: yes, no"):
            self.ids(folder, ("yes", "no"))

    @pytest.mark.parametrize("value", [-1, -2, -100])
    def test_unlabelled_splits(self, tmp_path, value):
        """A split whose labels are all below 0 is called unlabelled, else they are counted."""
        builders.write_images(tmp_path / "train.parquet", PICTURES)
        for count, words in ((6, r"no labels \(they are"), (2, r"2 of 6 rows without .* \(it is")):
            builders.write_images(tmp_path / "test.parquet", PICTURES)
            table = parquet.read_table(tmp_path / "test.parquet")
            numbers = pyarrow.array([value] * count + [y for _, y in PICTURES[count:]])
            table = table.set_column(1, table.schema.field(1), numbers)
            parquet.write_table(table, tmp_path / "test.parquet")
            found = opened(tmp_path, IMAGES)
            with pytest.raises(DataError, match=f"--eval-split has {words} {value}"):
                loaders(recipe(tmp_path), found, plain())

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_rows_without_a_label(self, tmp_path, split):
        """An empty label is refused in words, in either split."""
        rows = {"train": ["a,pos", "b,neg"], "test": ["a,pos", "b,neg"]}
        rows[split] = ["a,pos", "b,"]
        folder = write_csv(tmp_path / "d", "text,label", **rows)
        source = recipe(folder)
        with pytest.raises(DataError, match="label"):
            loaders(source, open_data(source, TEXTS), tokenizer())

    def test_classes_without_a_label(self, tmp_path):
        """So is an empty cell in a column of classes."""
        content = [(image, None if i == 2 else c) for i, (image, c) in enumerate(COLOURED)]
        builders.write_images(tmp_path / "train.parquet", COLOURED)
        builders.write_images(tmp_path / "test.parquet", content)
        with pytest.raises(DataError, match="--eval-split has rows without a label"):
            loaders(recipe(tmp_path), opened(tmp_path, IMAGES), plain())

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            (["pos", "neg", " pos"], r"labels ' pos' and 'pos' of label differ by blanks or case"),
            (["pos", "Pos", "neg"], r"labels 'Pos' and 'pos' of label differ"),
            ([str(i) for i in range(30)], "label has 30 different values in 30 rows"),
            (["pos", "neg"], None),
            ([str(i) for i in range(30)] * 2, None),
        ],
    )
    def test_labels_that_look_like_mistakes_are_noted(self, tmp_path, labels, words):
        """They are learnt as they are written."""
        rows = [f"a,{label}" for label in labels]
        found = opened(write_csv(tmp_path / "d", "text,label", train=rows, test=rows), TEXTS)
        assert {*found.labels} == {*labels}
        assert [bool(re.search(words or "", note)) for note in found.notes] == [True] * bool(words)

    def test_a_column_of_lists_is_no_label(self, tmp_path):
        """Whatever its name is."""
        row = json.dumps({"text": "a", "labels": [0, 1]}) + "\n"
        for split in ("train", "test"):
            (tmp_path / f"{split}.jsonl").write_text(row)
        with pytest.raises(DataError, match="no column looks like a label"):
            opened(tmp_path, TEXTS)


class TestPreprocessing:
    def pixels(self, width, height, mode="RGB"):
        """Return a smooth picture of a size."""
        from PIL import Image

        random = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        return (
            Image.fromarray(random).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
        )

    @pytest.mark.parametrize("name", ["test_resnet", "resnet18", "efficientnet_b0", "test_vit"])
    @pytest.mark.parametrize("size", [(300, 200), (201, 333), (40, 40)])
    def test_is_timms_own(self, name, size):
        """A timm model's images are prepared as timm's own evaluation transform does."""
        import timm

        loaded = models.load(name, IMAGES, ("a", "b"), pretrained=False)
        settings = timm.data.resolve_data_config(model=loaded.model)
        wanted = timm.data.create_transform(**settings)(self.pixels(*size))
        prepared = loaded.preprocessing
        got = prepared.batch(prepared.image(self.pixels(*size))[None])[0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
    def test_any_mode_becomes_rgb(self, mode):
        """Grey, transparent and palette pictures have three channels afterwards."""
        assert plain().image(self.pixels(8, 6, mode)).shape == (3, 6, 8)

    def test_grey(self):
        """One mean means one channel."""
        grey = ImagePreprocessing(mean=(0.5,), std=(0.25,))
        image = grey.image(self.pixels(8, 6))
        assert image.shape == (1, 6, 8)
        assert image.dtype == torch.uint8
        expected = (image.float() / 255 - 0.5) / 0.25
        torch.testing.assert_close(grey.batch(image[None])[0], expected)

    def test_pictures_of_the_right_size_stay_as_they_are(self):
        """At the size that a user asks for an image is neither resized nor cropped."""
        image = self.pixels(16, 16)
        kept = ImagePreprocessing(crop_pct=0.875).override(16, None, None).image(image)
        assert np.array_equal(kept.permute(1, 2, 0).numpy(), np.array(image))
        own = ImagePreprocessing(size=(16, 16), crop_pct=0.875)
        assert own.override(16, None, None) == own

    @pytest.mark.parametrize(
        ("mean", "std"),
        [((0.5,), (0.1, 0.2, 0.3)), ((0.5, 0.5), (1.0, 1.0)), ((0.0,) * 3, (1.0, 0.0, 1.0))],
    )
    def test_statistics_that_do_not_fit(self, mean, std):
        """Mean and std need one or three values each, and std above 0."""
        with pytest.raises(RecipeError, match="std"):
            plain().override(None, mean, std)

    def test_a_size_that_no_reader_takes(self):
        """It is refused before it is trained on."""
        with pytest.raises(RecipeError, match="must be at most 8192 pixels"):
            plain().override(8193, None, None)

    @pytest.mark.parametrize(
        "prepared",
        [
            ImagePreprocessing(),
            ImagePreprocessing((32, 48), (0.1,), (0.2,), 0.875, "bicubic"),
        ],
    )
    def test_round_trip(self, tmp_path, prepared):
        """What config.json stores restores the same preprocessing."""
        stored = json.loads(json.dumps(prepared.save(tmp_path)))
        assert ImagePreprocessing.restore(stored) == prepared

    @pytest.mark.parametrize(
        "change",
        [
            {"size": 3},
            {"size": [1, "x"]},
            {"mean": 0.5},
            {"std": None},
            {"crop_pct": "all"},
            {"size": [8, 8], "crop_pct": 1e-310},
            {"size": [float("inf"), 32]},
            {"size": [-5, 3]},
            {"size": [100_000, 100_000]},
            {"size": "32"},
            {"size": [8, 8], "crop_pct": 1e-4},
            {"size": [8, 8], "crop_pct": float("inf")},
            {"size": [8, 8], "crop_mode": "x"},
            {"mean": [float("nan")] * 3},
            {"std": [0.0, 1.0, 1.0]},
            {"mean": [0.5]},
            {"interpolation": "magic"},
            {"extra": 1},
        ],
        ids=str,
    )
    def test_damaged_values(self, tmp_path, change):
        """Stored values of another kind are refused as a damaged config.json."""
        stored = {**plain().save(tmp_path), **change}
        with pytest.raises(FormatError, match="preprocessing"):
            ImagePreprocessing.restore(stored)

    def test_missing_values(self, tmp_path):
        """A stored preprocessing lacks no key."""
        stored = plain().save(tmp_path)
        del stored["mean"]
        with pytest.raises(FormatError, match="preprocessing"):
            ImagePreprocessing.restore(stored)


class TestBatches:
    def test_images(self):
        """Training is shuffled in whole batches; evaluation has every image once, in order."""
        source = recipe(builders.image_parquet(), batch_size=10)
        train, evaluation = loaders(source, open_data(source, IMAGES), plain())
        assert [len(batch["labels"]) for batch in train] == [10] * 4
        batches = list(evaluation)
        assert [len(batch["labels"]) for batch in batches] == [10, 10, 4]
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 2] * 8
        orders = [torch.cat([batch["labels"] for batch in train]).tolist() for _ in range(2)]
        assert orders[0] != orders[1]

    def test_fewer_samples_than_a_batch(self):
        """A data set smaller than a batch is one batch."""
        source = recipe(builders.image_parquet(), batch_size=64, max_train_samples=5)
        train, _ = loaders(source, open_data(source, IMAGES), plain())
        assert [len(batch["labels"]) for batch in train] == [5]

    def test_images_are_decoded_once(self, monkeypatch):
        """The second pass takes images from memory, unless they do not fit."""
        source = recipe(builders.image_parquet(), max_eval_samples=5)
        decoded = []
        original = ImagePreprocessing.image
        monkeypatch.setattr(
            ImagePreprocessing, "image", lambda self, im: decoded.append(im) or original(self, im)
        )
        for limit, count in ((2**20, 5), (2 * 3 * 16 * 16, 2 + 2 * 3)):
            monkeypatch.setattr(batches, "CACHE_BYTES", limit)
            _, evaluation = loaders(source, open_data(source, IMAGES), plain())
            passes = [[batch["pixel_values"] for batch in evaluation] for _ in range(2)]
            assert len(decoded) == count
            assert torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))
            decoded.clear()

    def test_a_damaged_image_is_named(self, tmp_path):
        """A file that is no image is an error with its number."""
        for split in ("train", "test"):
            for i in range(3):
                path = tmp_path / split / f"class{i}" / "x.png"
                path.parent.mkdir(parents=True)
                path.write_bytes(b"no picture")
        source = recipe(tmp_path)
        _, evaluation = loaders(source, open_data(source, IMAGES), plain())
        with pytest.raises(DataError, match=r"the image .*/test/class0/x\.png cannot be decoded"):
            next(iter(evaluation))

    def test_texts_are_padded_within_a_batch(self):
        """Sentences become token ids with an attention mask, padded to the longest."""
        source = recipe(builders.text_csv(), text_columns=["sentence"], batch_size=16)
        _, evaluation = loaders(source, open_data(source, TEXTS), tokenizer())
        (batch,) = list(evaluation)
        lengths = batch["attention_mask"].sum(1)
        words = [len(text.split()) for text, _ in builders.sentences(16, seed=16)]
        assert lengths.tolist() == [count + 2 for count in words]
        assert batch["input_ids"].shape == (16, max(words) + 2)
        assert batch["labels"].tolist() == [1, 0] * 8

    def test_pairs_have_two_segments(self):
        """The second text of a pair follows the first, marked by its token type."""
        source = recipe(builders.text_pairs_json(), batch_size=16)
        _, evaluation = loaders(source, open_data(source, TEXTS), tokenizer())
        (batch,) = list(evaluation)
        assert (batch["input_ids"] == 3).sum(1).tolist() == [2] * 16
        assert batch["token_type_ids"].amax(1).tolist() == [1] * 16

    def test_max_length_truncates(self):
        """No sample is longer than --max-length."""
        source = recipe(builders.text_pairs_json(), batch_size=16, max_length=6)
        _, evaluation = loaders(source, open_data(source, TEXTS), tokenizer())
        (batch,) = list(evaluation)
        assert batch["input_ids"].shape == (16, 6)

    def test_empty_texts(self, tmp_path):
        """A missing sentence is an empty one."""
        rows = ["good film,0", ",1"]
        folder = write_csv(tmp_path / "d", "text,label", train=rows, test=rows)
        source = recipe(folder)
        _, evaluation = loaders(source, open_data(source, TEXTS), tokenizer())
        (batch,) = list(evaluation)
        assert batch["attention_mask"].sum(1).tolist() == [4, 2]

    def test_a_corpus_becomes_blocks(self):
        """Tokens run on from line to line; a block has its own tokens as labels."""
        source = recipe(builders.corpus(), max_length=16, batch_size=1000)
        _, evaluation = loaders(source, open_data(source, LM), tokenizer())
        (batch,) = list(evaluation)
        lines = (builders.corpus() / "validation.txt").read_text().splitlines()
        wanted = [t for line in lines for t in tokenizer().tokenizer(line)["input_ids"]]
        count = len(wanted) // 16
        assert (
            batch["input_ids"].tolist() == torch.tensor(wanted[: count * 16]).view(-1, 16).tolist()
        )
        assert torch.equal(batch["labels"], batch["input_ids"])

    def test_an_empty_cell_of_a_corpus(self, tmp_path):
        """It is an empty line."""
        lines = [{"text": "good film"}, {"text": None}, {"text": "bad film"}]
        for split in ("train", "validation"):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"{split}.jsonl").write_text(text)
        source = recipe(tmp_path, max_length=5)
        _, evaluation = loaders(source, open_data(source, LM), tokenizer())
        (batch,) = list(evaluation)
        known = [
            token
            for line in lines
            for token in tokenizer().tokenizer(line["text"] or "")["input_ids"]
        ]
        assert batch["input_ids"].tolist() == [known[:5], known[5:10]]

    def test_a_row_without_an_image(self, tmp_path):
        """Is said to be one."""
        for split in ("train", "test"):
            builders.write_images(tmp_path / f"{split}.parquet", [(None, 1), *COLOURED])
        source = recipe(tmp_path)
        _, evaluation = loaders(source, open_data(source, IMAGES), plain())
        with pytest.raises(DataError, match="row without an image"):
            list(evaluation)

    def test_a_corpus_shorter_than_a_block(self):
        """Too little text names the tokens there are and --max-length."""
        source = recipe(builders.corpus(), max_length=100_000)
        with pytest.raises(DataError, match=r"less than one block of 100000.*--max-length"):
            loaders(source, open_data(source, LM), tokenizer())

    def test_a_part_of_a_corpus_is_some_of_its_blocks(self):
        """Text stays text: lines follow each other as in the corpus; a seed chooses the blocks."""
        whole = recipe(builders.corpus(), max_length=5, batch_size=1)
        limits = {"max_train_samples": 4, "max_eval_samples": 3}

        def blocks(**changes):
            source = recipe(builders.corpus(), max_length=5, batch_size=1, **changes)
            train, evaluation = loaders(source, open_data(source, LM), tokenizer())
            return [
                {tuple(batch["input_ids"][0].tolist()) for batch in loader}
                for loader in (train, evaluation)
            ]

        all_of_them = blocks()
        first, again, other = blocks(**limits), blocks(**limits), blocks(**limits, seed=1)
        assert [len(part) for part in first] == [4, 3]
        assert all(part < full for part, full in zip(first, all_of_them, strict=True))
        assert first == again
        assert other[0] != first[0]
        assert other[1] == first[1]
        assert (
            open_data(whole, LM).train["text"]
            == open_data(recipe(builders.corpus(), **limits), LM).train["text"]
        )

    def test_rows_without_a_text(self, tmp_path):
        """They are read as empty, which is said: csv reads NA and null as such."""
        rows = ["NA,neg", "fine,pos", "null,pos", "good,neg"]
        folder = write_csv(tmp_path / "d", "text,label", train=rows, test=["good,pos"])
        found = opened(folder, TEXTS, max_train_samples=1)
        assert len(found.notes) == 1
        assert "2 of 4 rows of --train-split have no text and are read as empty" in found.notes[0]
        (note,) = open_eval(recipe(folder, eval_split="train"), TEXTS, ("neg", "pos")).notes
        assert "2 of 4 rows of --eval-split have no text" in note
        halves = {"train_split": "train[1:2]", "eval_split": "train[2:]"}
        (note,) = opened(folder, LM, **halves, text_columns=["text"]).notes
        assert "1 of 2 rows of --eval-split have no text" in note

    @pytest.mark.parametrize(("texts", "least"), [(("a",), 3), (("a", "b"), 5)])
    def test_a_length_without_room_for_a_word(self, tmp_path, texts, least):
        """The tokens that begin and end a text are all that would be left of it."""
        folder = write_csv(tmp_path / "d", "a,b,label", train=["x,y,0", "y,x,1"])
        preprocessing = tokenizer()
        for length in (least - 1, least):
            given = recipe(folder, eval_split="train", text_columns=texts, max_length=length)
            data = open_data(given, TEXTS)
            if length < least:
                with pytest.raises(DataError, match=f"--max-length {length}: . tokens begin"):
                    loaders(given, data, preprocessing)
            else:
                loaders(given, data, preprocessing)

    def test_a_text_without_a_token(self, tmp_path):
        """Its embedding would be a mean over nothing."""
        folder = tmp_path / "words"
        shutil.copytree(builders.bert(), folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
        bare = hf_models.load_tokenizer(str(folder), trust_remote_code=False)
        rows = ['"  ",neg', "fine,pos"]
        source = recipe(write_csv(tmp_path / "d", "text,label", train=rows, test=rows))
        _, evaluation = loaders(source, open_data(source, TEXTS), bare)
        with pytest.raises(DataError, match=r"the text '  ', of which the tokenizer makes no tok"):
            list(evaluation)

    # More workers than this machine may have cores.
    @pytest.mark.filterwarnings("ignore:This DataLoader will create")
    @pytest.mark.parametrize("workers", [0, 1])
    def test_samples_that_make_no_batch(self, tmp_path, workers):
        """One sentence, also where a worker found out: images of two sizes, in training alone."""
        sizes = [*COLOURED, (Image.new("RGB", (9, 16)), 1)]
        builders.write_images(tmp_path / "train.parquet", sizes)
        builders.write_images(tmp_path / "test.parquet", COLOURED)
        source = recipe(tmp_path, batch_size=len(sizes), num_workers=workers)
        train, _ = loaders(source, open_data(source, IMAGES), plain())
        with pytest.raises(DataError, match=r"^the samples do not make a batch") as caught:
            list(train)
        assert "Traceback" not in str(caught.value)
        assert str(caught.value).endswith("Images of different sizes need --image-size.")

    def test_an_image_larger_than_pillow_decodes(self, tmp_path, monkeypatch):
        """What might be a bomb is refused with the number of the image."""
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        for split in ("train", "test"):
            builders.write_images(tmp_path / f"{split}.parquet", COLOURED)
        source = recipe(tmp_path)
        _, evaluation = loaders(source, open_data(source, IMAGES), plain())
        wanted = r"image 0 of the 6 of its split cannot be decoded.*pixels"
        with pytest.raises(DataError, match=wanted):
            list(evaluation)

    def test_workers_share_the_memory_for_images(self, monkeypatch):
        """Each keeps decoded images of its own."""
        source = recipe(builders.image_parquet())
        opened = open_data(source, IMAGES)
        kept = {}
        for workers in (None, 4):
            info = workers and SimpleNamespace(num_workers=workers)
            monkeypatch.setattr(batches, "get_worker_info", lambda info=info: info)
            samples = batches.Images(opened.train, "image", None, plain())
            monkeypatch.setattr(batches, "CACHE_BYTES", 12 * samples[0]["pixel_values"].nbytes)
            for i in range(len(samples)):
                samples[i]
            kept[workers] = len(samples._cache)
        assert kept == {None: 12, 4: 3}

    def test_a_streamed_evaluation_is_copied_once(self, tmp_path, monkeypatch):
        """The next run finds the copy, as long as the files are the same."""
        cache = tmp_path / "cache"
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        for images, copies in ((COLOURED, 1), (None, 1), (COLOURED[2:], 2)):
            for split in ("train", "test") if images else ():
                builders.write_images(tmp_path / "d" / f"{split}.parquet", images)
            found = opened(tmp_path / "d", IMAGES, streaming=True, max_steps=1)
            assert len(found.eval) == len(images or COLOURED)
            assert len([*cache.glob("generator/*")]) == copies

    def test_evaluation_alone(self):
        """An artifact's evaluation opens one split and has no training loader."""
        source = recipe(builders.image_parquet())
        train, evaluation = loaders(
            source, open_eval(source, IMAGES, ("red", "green", "blue")), plain()
        )
        assert train is None
        assert sum(len(batch["labels"]) for batch in evaluation) == 24

    def test_prepare_batch_normalises_after_augmenting(self):
        """Augmentation sees the image's own values, the network normalised ones."""
        pixels = torch.arange(2 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(2, 3, 8, 8)
        batch = prepare_batch({"pixel_values": pixels, "labels": torch.ones(2)}, plain())
        torch.testing.assert_close(batch["pixel_values"], plain().batch(pixels))
        text = {"input_ids": torch.ones(2, 3)}
        assert prepare_batch(text, tokenizer(), "crop-flip") is text


class TestAugment:
    def positions(self, batch, height, width):
        """Return images whose pixels are their own coordinates."""
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.stack([rows, columns]).expand(batch, 2, height, width).contiguous()

    def test_none_changes_nothing(self):
        """Without augmentation the batch is the same object, and no random number is drawn."""
        pixels = self.positions(4, 8, 8)
        state = torch.get_rng_state()
        assert augment(pixels, "none") is pixels
        assert torch.equal(torch.get_rng_state(), state)

    @given(seed=st.integers(0, 2**32), height=st.integers(1, 20), width=st.integers(1, 20))
    def test_flip_mirrors_whole_images(self, seed, height, width):
        """Each image is as it was, or mirrored left to right."""
        torch.manual_seed(seed)
        pixels = self.positions(6, height, width)
        for before, after in zip(pixels, augment(pixels, "flip"), strict=True):
            assert torch.equal(after, before) or torch.equal(after, before.flip(2))

    @given(seed=st.integers(0, 2**32), height=st.integers(1, 40), width=st.integers(1, 40))
    def test_crop_shifts_by_an_eighth_at_most(self, seed, height, width):
        """Each image is shifted as a whole, and its edge repeated where it moved in."""
        torch.manual_seed(seed)
        pixels = self.positions(4, height, width)
        for image in augment(pixels, "crop"):
            middle = height // 2, width // 2
            dy, dx = image[0, middle[0], 0] - middle[0], image[1, 0, middle[1]] - middle[1]
            assert abs(dy) <= height // 8
            assert abs(dx) <= width // 8
            rows = (torch.arange(height) + dy).clamp(0, height - 1)
            columns = (torch.arange(width) + dx).clamp(0, width - 1)
            assert torch.equal(image[0], rows[:, None].expand(height, width))
            assert torch.equal(image[1], columns.expand(height, width))

    @pytest.mark.parametrize("kind", ["crop", "flip", "crop-flip"])
    def test_draws_from_the_global_generator(self, kind):
        """The same seed gives the same images, another one others, and images differ."""
        pixels = self.positions(16, 16, 16)
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            made.append(augment(pixels, kind))
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[0], made[2])
        assert len({tuple(image.flatten().tolist()) for image in made[0]}) > 1

    def test_half_of_the_images_are_flipped(self):
        """Flips are as frequent as no flips."""
        flipped = augment(self.positions(2000, 1, 2), "flip")[:, 1, 0, 0]
        assert 900 < int(flipped.sum()) < 1100


class TestTraps:
    """Files as they come, which would be read as something else without a word."""

    @pytest.mark.parametrize("order", ["sorted", "mostly new", "mixed"])
    def test_slices_of_rows_that_are_sorted_by_class(self, tmp_path, order):
        """Accuracy on one class, or on such as were never trained, would mean nothing."""
        labels = {
            "sorted": ["a"] * 60 + ["b"] * 60,
            "mostly new": ["a"] * 54 + ["b"] * 54 + ["c"] * 5 + ["d"] * 7,
            "mixed": ["a", "b"] * 60,
        }[order]
        folder = write_csv(tmp_path / "d", "text,label", train=[f"x,{y}" for y in labels])
        slices = {"train_split": "train[:90%]", "eval_split": "train[90%:]"}
        if order == "mixed":
            assert len(opened(folder, TEXTS, **slices).eval) == 12
        else:
            with pytest.raises(DataError, match="the rows are sorted by class"):
                opened(folder, TEXTS, **slices)

    @pytest.mark.parametrize("which", ["train_split", "eval_split", "both"])
    def test_slices_of_splits_that_are_sorted_by_class(self, tmp_path, which):
        """They lack classes of their split; whole, both splits would do."""
        rows = [f"x {i},{label}" for label in "abcd" for i in range(6)]
        folder = write_csv(tmp_path / "d", "text,label", train=rows, test=rows)
        assert len(opened(folder, TEXTS, eval_split="test").eval) == 24
        assert len(opened(folder, TEXTS, eval_split="test[:100%]").eval) == 24
        slices = {"train_split": "train[:50%]", "eval_split": "test[:50%]"}
        changes = slices if which == "both" else {which: slices[which]}
        with pytest.raises(DataError, match="the rows are sorted by class"):
            opened(folder, TEXTS, **{"eval_split": "test", **changes})

    def test_a_sum_of_splits(self, tmp_path):
        """Whole, or of slices; both parts have to be there."""
        folder = write_csv(tmp_path / "d", "text,label", train=["x,a", "x,b"], test=["y,a", "y,b"])
        for name, count in (("train+test", 4), ("train[:1]+test", 3)):
            assert len(opened(folder, TEXTS, train_split=name).train) == count
        with pytest.raises(DataError, match=r"has no split 'tests' \(did you mean test"):
            opened(folder, TEXTS, train_split="train+tests")
        with pytest.raises(RecipeError, match="a stream has no slices and no sums"):
            recipe(folder, train_split="train+test", streaming=True, max_steps=1)

    def test_several_columns_that_may_hold_the_labels(self, tmp_path):
        """One is read if it is called so as well; else the user says which."""
        kind = datasets.ClassLabel(names=["web", "book"])
        rows = {"text": ["a", "b"] * 2, "source": [0, 1] * 2, "label": [0, 1, 2, 3]}
        numbers = datasets.Value("int64")
        for name, types, found in (
            ("refused", {"source": kind, "label": numbers}, None),
            ("two", {"source": kind, "origin": kind}, None),
            ("named", {"source": kind, "label": datasets.ClassLabel(num_classes=4)}, "label"),
            ("alone", {"source": kind}, "source"),
        ):
            columns = {key: rows.get(key, rows["source"]) for key in ("text", *types)}
            features = datasets.Features({"text": datasets.Value("string"), **types})
            path = tmp_path / f"{name}.parquet"
            datasets.Dataset.from_dict(columns, features).to_parquet(path)
            if found:
                assert opened(path, TEXTS, eval_split="train").columns.label == found
                continue
            with pytest.raises(DataError, match="may all hold the labels; say which"):
                opened(path, TEXTS, eval_split="train")
            chosen = opened(path, TEXTS, eval_split="train", label_column="source")
            assert chosen.labels == ("web", "book")

    def test_labels_that_may_mean_none(self, tmp_path):
        """-1 beside 0, 1, 2 is noted, beside 1 it is a class; NaN is none."""
        for name, labels, noted in (("d", (-1, 0, 1, 2), 1), ("e", (-1, 0, 1), 0)):
            rows = [f"x,{label}" for label in labels]
            found = opened(write_csv(tmp_path / name, "text,label", train=rows, test=rows), TEXTS)
            assert sum("-1 of label is learnt as a class" in note for note in found.notes) == noted
        path = tmp_path / "f.parquet"
        rows = {"text": ["a", "b"], "label": [1.0, float("nan")]}
        datasets.Dataset.from_dict(rows).to_parquet(path)
        with pytest.raises(DataError, match="rows without a label"):
            opened(path, TEXTS, eval_split="train")

    def test_the_columns_of_a_run(self, tmp_path):
        """Evaluation reads them again, where the data set has them and no flag names others."""
        row = "good,dull,yes,no"
        header = "text,summary,label,other"
        folder = write_csv(tmp_path / "d", header, train=[row], test=[row])
        for named, flags, found in (
            ({"text_columns": ["summary"]}, {}, ("summary", "label")),
            ({"text_columns": ["summary"]}, {"text_columns": ("text",)}, ("text", "label")),
            ({"text_columns": ["sentence"]}, {}, ("text", "label")),
            ({"text_columns": [], "label_column": None}, {}, ("text", "label")),
            ({"label_column": "other"}, {}, ("text", "other")),
            (None, {}, ("text", "label")),
        ):
            columns = open_eval(recipe(folder, **flags), TEXTS, ("yes", "no"), named).columns
            assert (*columns.inputs, columns.label) == found

    def test_a_slice_of_few_rows_may_have_one_class(self, tmp_path):
        """Nine rows happen to."""
        folder = write_csv(tmp_path / "d", "text,label", train=["x,a", "x,b"] * 10 + ["x,b"] * 9)
        slices = {"train_split": "train[:20]", "eval_split": "train[20:]"}
        assert len(opened(folder, TEXTS, **slices).eval) == 9

    @pytest.mark.parametrize("name", ["train.tsv", "."], ids=["file", "folder"])
    def test_a_quote_in_a_tsv_is_a_character(self, tmp_path, name):
        """It opens no field that goes on over rows."""
        rows = [f"row {i}\t{i % 2}" for i in range(8)]
        rows[2], rows[5] = '"quoted\t1', '"again" and more\t0'
        (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
        found = opened(tmp_path / name, TEXTS, eval_split="train")
        assert [f"{row['text']}\t{row['label']}" for row in found.train] == rows

    def test_a_tsv_among_other_files(self, tmp_path):
        """What datasets reads counts, not what most files are."""
        rows = [f"row {i}\t{i % 2}" for i in range(8)]
        rows[2], rows[5] = '"quoted\t1', '"again" and more\t0'
        (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
        for name in ("README.md", "LICENSE.md", "original/a.txt", "original/b.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("text\n")
        assert len(opened(tmp_path, TEXTS, eval_split="train").train) == 8

    def test_a_folder_that_is_not_there(self, tmp_path, monkeypatch):
        """Datasets would take another one of that name, which it has cached."""
        for name in "ab":
            (tmp_path / name).mkdir()
        write_csv(tmp_path / "a" / "mine", "text,label", train=["x,0", "y,1"])
        monkeypatch.chdir(tmp_path / "a")
        assert len(opened("mine", TEXTS, eval_split="train").train) == 2
        monkeypatch.chdir(tmp_path / "b")
        with pytest.raises(DataError, match=r"no such file or folder here.*OWNER/NAME"):
            opened("mine", TEXTS, eval_split="train")

    @pytest.mark.parametrize("name", ["a*", "a[b]", "a?"])
    def test_a_folder_that_is_a_pattern(self, tmp_path, name):
        """Others that match would be read along, or in its place."""
        folder = write_csv(tmp_path / name, "text,label", train=["x,0", "y,1"])
        with pytest.raises(DataError, match="for a pattern; give the folder another name"):
            opened(folder, TEXTS, eval_split="train")

    @pytest.mark.parametrize("name", ["train[:90%", "train[:110%]", "train[a:b]"])
    def test_a_slice_that_is_none(self, name):
        """The flag is named, and what a slice looks like."""
        with pytest.raises(DataError, match=r"--train-split 'train\[.*as in 'train\[:90%\]'"):
            opened(builders.image_parquet(), IMAGES, train_split=name)

    @pytest.mark.parametrize("name", ["train.jsonl", "."], ids=["file", "folder"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_an_empty_file(self, tmp_path, name, streaming):
        """It is called empty."""
        (tmp_path / "train.jsonl").write_text("")
        changes = {"streaming": True, "max_steps": 1} if streaming else {}
        with pytest.raises(DataError, match="it is empty"):
            opened(tmp_path / name, TEXTS, eval_split="train", **changes)

    def test_brackets_in_the_name_of_a_file(self, tmp_path):
        """They are no pattern."""
        (tmp_path / "rev [final].csv").write_text("text,label\na,0\nb,1\n")
        assert len(opened(tmp_path / "rev [final].csv", TEXTS, eval_split="train").train) == 2

    def test_why_a_file_cannot_be_read(self, tmp_path):
        """The reason is in the message, not only that there is one."""
        (tmp_path / "d.csv").write_text("text,label\na,0\nb,1,2,3\n")
        with pytest.raises(DataError, match="Expected 2 fields in line 3, saw 4"):
            opened(tmp_path / "d.csv", TEXTS, eval_split="train")

    def test_targets_that_are_no_classes(self, tmp_path):
        """Numbers with fractions are refused; whole ones in a float column are classes."""
        for values, wrong in ((["0.5", "1.0"], True), (["0.0", "1.0"], False)):
            folder = write_csv(tmp_path / values[0], "text,label", train=[f"x,{v}" for v in values])
            if wrong:
                with pytest.raises(DataError, match=r"fractions, such as 0\.5"):
                    opened(folder, TEXTS, eval_split="train")
            else:
                assert opened(folder, TEXTS, eval_split="train").labels == ("0.0", "1.0")

    def test_a_picture_as_it_was_held(self):
        """A camera notes how; datasets turns it, and so does who opens the file itself."""
        picture = Image.new("RGB", (40, 20))
        exif = picture.getexif()
        exif[274] = 6  # orientation: to be turned by 90 degrees
        file = io.BytesIO()
        picture.save(file, "jpeg", exif=exif)
        pixels = ImagePreprocessing().image(Image.open(file))
        assert pixels.shape == (3, 40, 20)

    def test_images_of_sixteen_bits(self):
        """Black stays black and white white; numbers without either are refused."""
        ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
        for order in ("<", ">"):
            deep = Image.fromarray(ramp.astype(f"{order}u2"))
            assert deep.mode == ("I;16" if order == "<" else "I;16B")
            assert ImagePreprocessing().image(deep)[0].flatten().tolist() == list(range(256))
        processor = models.load(str(builders.vit()), IMAGES, ("a", "b", "c")).preprocessing
        seen = processor.image(deep)
        assert len(seen.unique()) > 100
        for mode in ("I", "F"):
            with pytest.raises(DataError, match=f"Pillow's mode {mode}"):
                ImagePreprocessing().image(Image.new(mode, (4, 4)))
