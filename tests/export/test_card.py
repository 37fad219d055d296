"""The model card has the facts of the model, and only those."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import BOTH, DOMAIN, Tiny, X, Y, domain_labels, make_classifier
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import Bunch

from sktransfer import (
    FineTunedImageClassifier,
    ModelFileError,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    make_card,
    save,
)
from sktransfer.cli.evaluate import score
from sktransfer.cli.messages import Notes

SAVED = Path(__file__).parent / "saved"


def extractor(backbone=Tiny, **parameters):
    return PretrainedFeatureExtractor(backbone, cache=None, **parameters)


@pytest.fixture(scope="module")
def classifier():
    return make_classifier(max_epochs=2).fit(X, Y)


def section(card, name):
    """Return the text of a section, up to the next one of the same level or above."""
    level = re.search(rf"^(#+) {re.escape(name)}$", card, re.M).group(1)
    text = card.partition(f"\n{level} {name}\n")[2]
    return re.split(rf"^#{{1,{len(level)}}} ", text, maxsplit=1, flags=re.M)[0].strip()


def rows(text):
    """Return the rows of a table, header first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for number, row in enumerate(cells) if number != 1]


def evaluation(classifier, X=X, y=Y, split="test"):
    scores = score(classifier, Bunch(data=list(X), labels=y, split=None), False, Notes(quiet=True))
    return {"split": split, **scores}


def test_training_images_are_counted_by_class(classifier):
    few = np.r_[np.arange(45), 45, 48, 51]  # 18 cats, and 15 dogs and owls
    card = make_card(make_classifier(max_epochs=1).fit(X[few], Y[few]))
    text = section(card, "Training images")
    assert text.startswith("48 labeled images, 15 to 18 of each class.")
    assert rows(text) == [["Class", "Images"], ["cat", "18"], ["dog", "15"], ["owl", "15"]]
    assert section(make_card(classifier), "Training images").startswith(
        "60 labeled images, 20 of each class."
    )


def test_network_and_training_are_those_of_the_model(classifier):
    card = make_card(classifier)
    assert ["Estimator", "`FineTunedImageClassifier`"] in rows(section(card, "Network"))
    parameters = dict(rows(section(card, "Parameters")))
    assert (parameters["batch_size"], parameters["unfreeze"]) == ("8", "(0, 1, 2)")
    assert parameters["augment"] == repr(classifier.decision_.parameters["augment"])
    assert not {"cache", "verbose", "device"} & parameters.keys()
    header, *stages = rows(section(card, "Training"))
    assert header[-3:] == ["Validation loss", "Validation accuracy", "Best epoch"]
    expected = [
        [stage["stage"], f"{stage['trainable']:,}", str(stage["epochs"] or "-")]
        for stage in classifier.stages_
    ]
    assert [row[:3] for row in stages] == expected
    best = classifier.stages_[-1]
    values = [f"{best['valid_loss']:.3f}", f"{best['valid_acc']:.3f}", str(best["best_epoch"])]
    assert stages[-1][-3:] == values


def test_strategy_has_its_reason():
    decided = make_classifier(unfreeze="auto", max_epochs=1).fit(X[:9], Y[:9])
    text = section(make_card(decided), "Network")
    strategy = dict(rows(text.partition("###")[0]))["Strategy"]
    assert strategy.startswith(f"{decided.decision_.strategy}: ")
    assert text.startswith(str(decided.decision_).partition("). ")[2])


def test_preprocessing_is_that_of_the_model():
    text = section(make_card(extractor(image_size=(20, 24)).fit(X / 255.0)), "Preprocessing")
    assert "of images that are not 8-bit, 0 is black, 1 is white." in text
    assert "Images are resized to 20 x 24 pixels" in text
    assert "crop" not in text
    text = section(make_card(extractor().fit(X)), "Preprocessing")
    assert "not 8-bit" not in text
    assert "The shorter side is resized to 16 pixels (bilinear)" in text
    assert "The center crop has 16 x 16 pixels" in text
    assert "the mean 0.485, 0.456, 0.406 and" in text


@pytest.mark.parametrize("saved", sorted(SAVED.glob("*.skt")), ids=lambda path: path.stem)
def test_files_of_earlier_releases_have_cards(saved):
    card = make_card(saved)
    assert card.partition("\n# ")[2].startswith(f"{saved.stem}\n")
    assert f"model = sktransfer.load({json.dumps(saved.name)})" in card
    assert ["cat"] in [row[:1] for row in rows(card)]
    counted = "60 labeled images, 20 of each class on average." in card
    assert counted is ("pipeline" not in saved.stem)
    assert ("pip install sktransfer\n" in card) is ("pipeline" not in saved.stem)
    assert ("looked up on the machine" in card) is ("classifier" not in saved.stem)
    assert ("adapted statistics" in card) is ("classifier" in saved.stem)


def test_code_of_the_card_loads_the_model(tmp_path, monkeypatch):
    settings = {"image_size": 32, "unfreeze": 0, "augment": None, "cache": None}
    save(FineTunedImageClassifier(**settings).fit(X, Y), tmp_path / 'my "cats".skt')
    card = make_card(tmp_path / 'my "cats".skt')
    code = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(X[0]).save(tmp_path / "image.jpg")
    namespace = {}
    exec(code, namespace)
    assert namespace["labels"].tolist() == ["cat"]
    assert namespace["probabilities"].shape == (1, 3)


def test_own_network_is_passed_in_the_code(classifier):
    text = section(make_card(classifier), "How to use")
    assert 'sktransfer.load("model.skt", backbone=Tiny)' in text
    assert "`helpers.Tiny` is the code of the network" in text
    on_top = extractor(classifier).fit(X)
    assert "backbone=Tiny)" in section(make_card(on_top), "How to use")


def test_metadata_are_read_by_the_hub(classifier):
    hub = pytest.importorskip("huggingface_hub")
    license_id = 'other: "terms" #1'
    card = make_card(classifier, evaluation=evaluation(classifier), license_id=license_id)
    assert hub.ModelCard(card).data.to_dict() == {
        "library_name": "sktransfer",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "transfer-learning"],
        "license": license_id,
        "metrics": ["accuracy"],
    }
    data = hub.ModelCard(make_card(extractor().fit(X))).data.to_dict()
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert not {"license", "metrics"} & data.keys()


def test_scores_have_intervals(classifier):
    y = np.where(np.arange(60) % 10 == 0, "swan", Y)
    y[Y == "owl"] = "dog"
    scores = evaluation(classifier, y=y)
    text = section(make_card(classifier, evaluation=scores), "Evaluation")
    low, high = scores["interval"]
    assert f"**{scores['accuracy']:.3f}**, with a 95% interval of {low:.3f} to {high:.3f}" in text
    assert f"{scores['correct']} of 60 labeled images of the split test." in text
    assert "Labels that the model does not know count as errors: swan." in text
    shown = {row[0]: row[1:] for row in rows(text.partition("###")[0])[1:]}
    for entry in scores["classes"]:
        n_images, precision, recall = shown[entry["label"]]
        assert n_images == str(entry["images"])
        for name, cell in (("precision", precision), ("recall", recall)):
            if entry[f"{name}_interval"] is None:
                assert cell == "-"
            else:
                values = (entry[name], *entry[f"{name}_interval"])
                assert cell == "{:.3f} ({:.3f} to {:.3f})".format(*values)
    matrix = rows(section(text, "Confusion matrix"))
    assert [[int(cell) for cell in row[1:]] for row in matrix[1:]] == scores["confusion"]["counts"]


def test_evaluation_can_be_a_file(classifier, tmp_path):
    scores = evaluation(classifier)
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    assert make_card(classifier, evaluation=tmp_path / "scores.json") == make_card(
        classifier, evaluation=scores
    )


def limitations(model, **options):
    return section(make_card(model, **options), "Limitations")


@pytest.mark.parametrize(
    ("split", "sentence"),
    [
        ("train", "that on training images"),
        ("val", "that on validation images"),
        ("all", "does not leave out images for training"),
        ("test", None),
        (None, None),
    ],
)
def test_scores_of_images_that_are_not_for_testing_are_a_limitation(classifier, split, sentence):
    text = limitations(classifier, evaluation=evaluation(classifier, split=split))
    assert ("optimistic" in text) is (sentence is not None)
    assert (sentence or "one of the 3 classes") in text


def test_limitations_follow_from_facts(classifier):
    assert limitations(classifier) == (
        "- An image of something else is also given one of the 3 classes.\n"
        "- There is no evaluation, so the accuracy on new images is not known."
    )
    no_owls = Y != "owl"
    scores = evaluation(classifier, X[no_owls], Y[no_owls])
    text = limitations(classifier, evaluation=scores)
    assert "The evaluation has no images of owl." in text
    assert "There is no evaluation" not in text
    two_owls = np.r_[np.flatnonzero(no_owls), np.flatnonzero(~no_owls)[:2]]
    uneven = make_classifier(max_epochs=1, early_stopping=False).fit(X[two_owls], Y[two_owls])
    text = limitations(uneven)
    assert "1 class has fewer than 10 training images: owl (2)." in text
    assert "The largest class has 10 times as many training images as the smallest." in text
    uneven.interrupted_ = True
    assert "The training was interrupted before its end." in limitations(uneven)
    random = extractor("resnet18", weights=None, image_size=32).fit(X)
    assert limitations(random) == "- The network was not pretrained."


def test_pipeline_has_no_training_images_of_a_classifier_inside(classifier):
    """It may have been trained on other images with other labels."""
    pipeline = make_pipeline(clone(classifier), LogisticRegression(max_iter=1000)).fit(
        X, Y == "cat"
    )
    card = make_card(pipeline)
    assert "labeled image" not in card
    assert rows(section(card, "Classes")) == [["Class"], ["False"], ["True"]]
    assert 'pip install "sktransfer[skops]"' in card
    assert "predict_proba" not in section(card, "How to use")


def test_task_of_other_pipelines_is_left_out():
    card = make_card(make_pipeline(extractor(), Ridge()).fit(X, np.arange(60)))
    assert "pipeline_tag" not in card
    assert section(card, "How to use").endswith(
        'model = sktransfer.load("model.skt", backbone=Tiny)\n```\n\n'
        "`helpers.Tiny` is the code of the network, which is not in the file."
    )


def test_self_training_counts_labels_and_not_pseudo_labels():
    inner = make_classifier(max_epochs=1, unfreeze=0, early_stopping=False)
    model = SelfTrainedImageClassifier(inner, shares=[0.5])
    card = make_card(model.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN))
    assert section(card, "Training images").startswith("60 labeled images, 20 of each class.")
    assert "on its own predictions" in section(card, "Limitations")
    assert section(card, "Training 2")
    assert card.count("### Parameters") == 1


def test_names_are_shown_without_markup(classifier):
    """Names of folders may have characters that Markdown or its tables use."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    names = ["__a__ *b* `c`", "x|y <b>", "[z](u) \\ & ~d~ e_f"]
    y = np.array(names)[np.searchsorted(["cat", "dog", "owl"], Y)]
    html = markdown.render(make_card(make_classifier(max_epochs=1).fit(X, y)))
    for name in names:
        shown = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert f">{shown}</td>" in html


def test_many_classes_are_folded():
    numbers = np.arange(60) % 25
    model = make_classifier(unfreeze=(1, 2), max_epochs=1, early_stopping=False).fit(X, numbers)
    card = make_card(model, evaluation=evaluation(model, y=numbers.astype(str)))
    assert "<details>" in section(card, "Training images")
    assert len(rows(section(card, "Training images"))) == 26
    assert "An image classifier of 25 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (25)." in card
    assert "Confusion matrix" not in card


def test_path_of_weights_stays_private(tmp_path):
    make_classifier(max_epochs=1).fit(X, Y).save_weights(tmp_path / "own.safetensors")
    card = make_card(extractor(weights=str(tmp_path / "own.safetensors")).fit(X))
    assert ["Weights", "own.safetensors"] in rows(section(card, "Network"))
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"accuracy 1.000", "which is not JSON; pass what `sktransfer evaluate MODEL DIR --json`"),
        (b"[" * 100_000, "which is not JSON"),
        (b"[1]", "without accuracy, classes, confusion, correct, images, interval, split; pass"),
        (b'{"accuracy": 1}', "without classes, confusion, correct, images, interval, split; pass"),
    ],
)
def test_other_content_of_an_evaluation_is_an_error(classifier, tmp_path, content, message):
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^Got {re.escape(repr(str(path)))}.*{message}"):
        make_card(classifier, evaluation=path)


@pytest.mark.parametrize(
    "change",
    [
        {"confusion": {}},
        {"confusion": {"labels": list("abc"), "counts": [[1, 2, 3]]}},
        {"interval": None},
        {"interval": (0.9, 0.1)},
        {"accuracy": None},
        {"accuracy": 3},
        {"accuracy": float("nan")},
        {"classes": []},
        {"classes": [1]},
        {"images": "x"},
        {"images": -1},
        {"correct": 10**9},
        {"split": "test\n# Good"},
    ],
)
def test_values_that_no_evaluation_has_are_an_error(classifier, change):
    message = r"^Got an evaluation with values that no evaluation has; pass what `sktransfer eval"
    with pytest.raises(ValueError, match=message):
        make_card(classifier, evaluation={**evaluation(classifier), **change})


def test_evaluation_of_another_model_is_an_error(classifier):
    other = make_classifier(max_epochs=1).fit(X, np.char.add(Y, "s"))
    scores = evaluation(other, y=np.char.add(Y, "s"))
    message = (
        "Got an evaluation of a model with the classes cats, dogs, owls, but this one has the "
        "classes cat, dog, owl; evaluate this model"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_card(classifier, evaluation=scores)
    with pytest.raises(ValueError, match=r"but this one has no classes; evaluate this model$"):
        make_card(extractor().fit(X), evaluation=scores)


@pytest.mark.parametrize("license_id", ["", " ", "mit\nlibrary_name: x", 3])
def test_license_that_is_not_one_line_is_rejected(classifier, license_id):
    with pytest.raises(ValueError, match=r"^Got the license .*, but expected a name such as mit"):
        make_card(classifier, license_id=license_id)


def test_file_without_a_model_is_an_error(tmp_path):
    (tmp_path / "model.skt").write_bytes(b"no model")
    with pytest.raises(ModelFileError, match="another kind of file"):
        make_card(tmp_path / "model.skt")
    with pytest.raises(FileNotFoundError):
        make_card(tmp_path / "gone.skt")


def test_model_that_cannot_be_saved_has_no_card():
    with pytest.raises(NotFittedError):
        make_card(extractor())
    search = GridSearchCV(make_pipeline(extractor(), LogisticRegression(max_iter=1000)), {}, cv=2)
    with pytest.raises(TypeError, match="save its best_estimator_"):
        make_card(search.fit(X, Y))


def test_missing_skops_is_an_error_with_a_remedy(classifier, monkeypatch):
    monkeypatch.setitem(sys.modules, "skops.card", None)
    with pytest.raises(ImportError, match=r"^A model card needs .*'sktransfer\[skops\]'$"):
        make_card(classifier)
