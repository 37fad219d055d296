"""An exported file computes what the model computes, or is not written."""

import functools
import io
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from export_helpers import EXAMPLES, TWO, extractor
from helpers import BOTH, DOMAIN, Tiny, X, Y, domain_labels, images, make_classifier, save_images
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler

from sktransfer import (
    FineTunedImageClassifier,
    PretrainedFeatureExtractor,
    SelfTrainedImageClassifier,
    export_onnx,
)
from sktransfer.export import onnx as onnx_export
from sktransfer.utils.errors import ExportError


def run(path, batches):
    """Run a file on batches (N, H, W, 3); return its outputs by name."""
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    rows = [session.run(names, {"images": batch}) for batch in batches]
    return dict(zip(names, map(np.concatenate, zip(*rows, strict=True)), strict=True))


def run_examples(path):
    return run(path, [image[None] for image in EXAMPLES])


@pytest.fixture(scope="module")
def classifier():
    return make_classifier().fit(X, Y)


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline(extractor(), StandardScaler(), LogisticRegression()).fit(X, Y)


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    """Return the pipeline's file and the result of its export."""
    path = tmp_path_factory.mktemp("exported") / "folder" / "model.onnx"
    return path, export_onnx(pipeline, path)


@pytest.fixture(scope="module")
def graph_bytes(classifier):
    return onnx_export.build_graph(classifier).SerializeToString()


def assert_equal_predictions(model, path):
    outputs = run_examples(path)
    assert list(outputs) in (["probabilities", "label"], ["label", "probabilities"])
    expected = model.predict_proba(EXAMPLES)
    assert outputs["probabilities"].dtype == np.float32
    # float16 at the boundary of a classifier multiplies differences in rounding.
    np.testing.assert_allclose(outputs["probabilities"], expected, atol=2e-4)
    assert outputs["label"].tolist() == model.predict(EXAMPLES).tolist()


@pytest.mark.slow_cases("two classes", "last block", "all blocks, boolean, of its own size")
@pytest.mark.parametrize(
    ("parameters", "y"),
    [
        ({}, Y),
        ({}, TWO),
        ({"unfreeze": (0, 1)}, Y),
        ({"unfreeze": "all", "image_size": (20, 31)}, Y == "dog"),
    ],
    ids=["staged", "two classes", "last block", "all blocks, boolean, of its own size"],
)
def test_file_predicts_as_the_classifier(parameters, y, tmp_path):
    model = make_classifier(**parameters).fit(X, y)
    result = export_onnx(model, tmp_path / "model.onnx", images=EXAMPLES)
    assert_equal_predictions(model, tmp_path / "model.onnx")
    assert (result.n_images, result.path) == (len(EXAMPLES), tmp_path / "model.onnx")
    found = run_examples(tmp_path / "model.onnx")["probabilities"]
    difference = abs(found - model.predict_proba(EXAMPLES)).max()
    assert result.max_difference == pytest.approx(difference, abs=1e-6)


@pytest.mark.slow_cases("two classes", "linear", "forest of numbers")
@pytest.mark.parametrize(
    ("steps", "y"),
    [
        ([LogisticRegression(max_iter=1000)], TWO),
        ([StandardScaler(), Normalizer(), LogisticRegression()], Y),
        ([MinMaxScaler(), PCA(4), RandomForestClassifier(10, random_state=0)], Y),
        ([RandomForestClassifier(10, random_state=0)], np.arange(60) % 2),
    ],
    ids=["two classes", "linear", "forest after PCA", "forest of numbers"],
)
def test_file_predicts_as_the_pipeline(steps, y, tmp_path):
    model = make_pipeline(extractor(), *steps).fit(X, y)
    export_onnx(model, tmp_path / "model.onnx")
    assert_equal_predictions(model, tmp_path / "model.onnx")


def test_tuned_network_at_the_start_of_a_pipeline(tmp_path):
    tuned = FrozenEstimator(make_classifier(unfreeze=(0, 1)).fit(X, Y))
    model = make_pipeline(tuned, StandardScaler(), LogisticRegression()).fit(X, TWO)
    export_onnx(model, tmp_path / "model.onnx")
    assert_equal_predictions(model, tmp_path / "model.onnx")


@pytest.mark.slow_cases("FineTunedImageClassifier")
@pytest.mark.parametrize(
    "estimator",
    [
        make_classifier(unfreeze=(0, 1)),
        make_pipeline(extractor(), LogisticRegression(max_iter=1000)),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_self_training_is_the_mean_of_its_classifiers(estimator, tmp_path):
    model = SelfTrainedImageClassifier(estimator, shares=[0.5])
    model.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)
    export_onnx(model, tmp_path / "model.onnx")
    assert_equal_predictions(model, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    contents = [each.raw_data for each in graph.initializer if len(each.raw_data) > 100]
    assert len(set(contents)) == len(contents)  # frozen weights are stored once


@pytest.mark.slow_cases("scaled", "passthrough")
@pytest.mark.parametrize(
    "model",
    [
        extractor(),
        extractor(layer=["0", "1"], pooling="avgmax"),
        make_pipeline(extractor(), StandardScaler()),
        make_pipeline(extractor(), "passthrough"),
        make_pipeline(extractor(), StandardScaler(), PCA(3)),
    ],
    ids=["extractor", "layers", "scaled", "passthrough", "reduced"],
)
def test_file_embeds_as_the_model(model, tmp_path):
    export_onnx(model.fit(X), tmp_path / "model.onnx")
    outputs = run_examples(tmp_path / "model.onnx")
    expected = model.transform(EXAMPLES)
    assert list(outputs) == ["embeddings"]
    metadata = {each.key: each.value for each in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(metadata["classes"]) is None
    assert abs(outputs["embeddings"] - expected).max() <= 1e-5 * abs(expected).max()


def halved(path):
    """Return the names of the float16 constants of a file."""
    graph = onnx.load(path).graph
    return [each.name for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT16]


HALF_MODELS = {
    "classifier": (make_classifier(unfreeze=(0, 1)), Y),
    "pipeline": (make_pipeline(extractor(), StandardScaler(), LogisticRegression()), Y),
    "extractor": (extractor(), None),
}


@pytest.mark.slow_cases("classifier", "pipeline")
@pytest.mark.parametrize("name", HALF_MODELS)
def test_file_with_float16_weights_computes_as_one_with_rounded_weights(name, tmp_path):
    model, y = HALF_MODELS[name]
    export_onnx(model.fit(X, y), tmp_path / "float32.onnx")
    result = export_onnx(model, tmp_path / "float16.onnx", weight_dtype="float16")
    (weight,) = halved(tmp_path / "float16.onnx")  # the kernels of the second block
    rounded = onnx.load(tmp_path / "float32.onnx")
    change_constants(
        rounded, weight.removesuffix(".half"), lambda w: w.astype(np.float16).astype(np.float32)
    )
    onnx.save(rounded, tmp_path / "rounded.onnx")
    outputs, expected = (run_examples(tmp_path / f"{kind}.onnx") for kind in ("float16", "rounded"))
    for output, values in expected.items():
        assert outputs[output].dtype == values.dtype
        assert outputs[output].tolist() == values.tolist()
    assert 0 < result.max_difference < 1e-2


@pytest.mark.slow
def test_float16_weights_that_are_shared_are_stored_once(tmp_path):
    model = SelfTrainedImageClassifier(
        make_pipeline(extractor(), LogisticRegression(max_iter=1000)), shares=[1]
    )
    model.fit(BOTH, domain_labels("cat"), sample_domain=DOMAIN)
    export_onnx(model, tmp_path / "model.onnx", weight_dtype="float16")
    assert len(model.estimators_) > 1
    assert len(halved(tmp_path / "model.onnx")) == 1


def test_float16_weights_may_change_probabilities_more(classifier):
    expected = classifier.predict_proba(EXAMPLES)
    outputs = {"probabilities": expected + 5e-3, "label": classifier.predict(EXAMPLES)}
    difference = onnx_export._compare(classifier, EXAMPLES, outputs, "float16")
    assert difference == pytest.approx(5e-3)
    with pytest.raises(ExportError, match=r"expected at most 0\.001; .*set precision='float32'"):
        onnx_export._compare(classifier, EXAMPLES, outputs, "float32")
    outputs["probabilities"] = expected + 0.02
    with pytest.raises(ExportError, match=r"expected at most 0\.01; .*with weight_dtype='float32'"):
        onnx_export._compare(classifier, EXAMPLES, outputs, "float16")


def test_batch_equals_its_images_one_by_one(exported):
    batch = images(7, 40)
    together = run(exported[0], [batch])
    apart = run(exported[0], [image[None] for image in batch])
    np.testing.assert_allclose(together["probabilities"], apart["probabilities"], atol=1e-6)
    assert together["label"].tolist() == apart["label"].tolist()
    assert len(set(together["probabilities"][:, 0])) == 7


def test_inputs_and_outputs_have_names_types_and_shapes(exported):
    session = onnxruntime.InferenceSession(exported[0])
    (images_input,) = session.get_inputs()
    assert (images_input.name, images_input.type) == ("images", "tensor(uint8)")
    assert images_input.shape == ["N", "height", "width", 3]
    outputs = {output.name: (output.type, output.shape) for output in session.get_outputs()}
    assert outputs["probabilities"] == ("tensor(float)", ["N", 3])
    assert outputs["label"] == ("tensor(string)", ["N"])


def test_metadata_hold_classes_and_preprocessing(classifier, graph_bytes):
    session = onnxruntime.InferenceSession(graph_bytes)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["cat", "dog", "owl"]
    (preprocessing,) = json.loads(metadata["preprocessing"])
    fitted = classifier.preprocessing_
    assert preprocessing["crop"] == list(fitted.crop)
    assert preprocessing["interpolation"] == fitted.interpolation
    assert preprocessing["mean"] == pytest.approx(fitted.mean)
    assert session.get_modelmeta().producer_name == "sktransfer"


def test_images_of_the_comparison_can_be_files(pipeline, tmp_path):
    paths = save_images(images(4, 50), tmp_path / "images")
    assert export_onnx(pipeline, tmp_path / "model.onnx", images=paths).n_images == 4


def test_result_shows_file_size_and_difference(exported):
    path, result = exported
    assert result.n_bytes == path.stat().st_size
    assert 0 < result.max_difference < 1e-5
    assert result.n_images == 12
    assert re.fullmatch(
        r"OnnxExport\('.*model\.onnx', \d\.\d MB, largest difference \d\.\de-\d\d on 12 images\)",
        repr(result),
    )


def change_constants(graph, name, change):
    """Change all constants of a graph whose name contains a text."""
    changed = [each for each in graph.graph.initializer if name in each.name]
    assert changed
    for constant in changed:
        array = onnx.numpy_helper.to_array(constant)
        constant.CopyFrom(onnx.numpy_helper.from_array(change(array), constant.name))


def wrong_weights(graph):
    change_constants(graph, "network.0.std", lambda std: std * np.float32(1.5))


def wrong_classes(graph):
    change_constants(graph, "label.", lambda classes: classes[::-1].copy())


def wrong_operator(graph):
    graph.graph.node[-1].op_type = "NoSuchOperator"


@pytest.mark.parametrize(
    ("break_graph", "message"),
    [
        (wrong_weights, r"Got an ONNX graph whose probabilities differ by .* from predict_proba"),
        (wrong_classes, r"Got an ONNX graph that predicts '.*' for image \d+, but expected '.*'"),
        (wrong_operator, "ONNX Runtime cannot run the exported graph"),
    ],
)
@pytest.mark.parametrize("has_old_file", [False, True])
def test_wrong_graph_is_not_written(
    classifier, graph_bytes, tmp_path, monkeypatch, break_graph, message, has_old_file
):
    graph = onnx.load_from_string(graph_bytes)
    break_graph(graph)
    monkeypatch.setattr(onnx_export, "build_graph", lambda *_: graph)
    if has_old_file:
        (tmp_path / "model.onnx").write_text("old")
    with pytest.raises(ExportError, match=message):
        export_onnx(classifier, tmp_path / "model.onnx")
    if has_old_file:
        assert (tmp_path / "model.onnx").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == has_old_file


def test_interrupted_writing_leaves_the_old_file(pipeline, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left")

    (tmp_path / "model.onnx").write_text("old")
    monkeypatch.setattr(onnx_export.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        export_onnx(pipeline, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "old"


@pytest.mark.parametrize(("gap", "is_tie"), [(0.0, True), (1e-4, True), (0.01, False)])
def test_label_may_only_differ_if_classes_tie(gap, is_tie):
    """Equal probabilities have no order that an export could keep."""
    model = make_pipeline(extractor(), LogisticRegression(C=1e-6)).fit(X, Y)
    model[-1].coef_[:] = 0
    model[-1].intercept_[:] = np.log([0.4 + gap, 0.4, 0.2])
    outputs = {
        "probabilities": model.predict_proba(EXAMPLES).astype(np.float32),
        "label": np.repeat("dog", len(EXAMPLES)),
    }
    assert set(model.predict(EXAMPLES)) == {"cat"}
    if is_tie:
        assert onnx_export._compare(model, EXAMPLES, outputs, "float32") < 1e-6
    else:
        with pytest.raises(ExportError, match="predicts 'dog' for image 0, but expected 'cat'"):
            onnx_export._compare(model, EXAMPLES, outputs, "float32")


class BranchingTiny(Tiny):
    """Its computation depends on the values of the image."""

    def __init__(self):
        super().__init__()
        self[0] = Branching(self[0])


class Branching(type(Tiny()[0])):
    def forward(self, x):
        return super().forward(x * 2 if float(x.sum()) > 1e9 else x)


def test_network_that_torch_cannot_export_names_the_cause(tmp_path):
    model = PretrainedFeatureExtractor(BranchingTiny, cache=None).fit(X)
    with pytest.raises(ExportError, match=r"Got a network that torch cannot export \(\w+: .+\)"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Halved(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X):
        return X / 2


def test_step_that_skl2onnx_does_not_know_is_named(tmp_path):
    model = make_pipeline(extractor(), StandardScaler(), Halved(), LogisticRegression()).fit(X, Y)
    message = r"steps 'standardscaler' .*, 'halved' \(Halved\), 'logisticregression' .*, which skl2"
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "model.onnx")


def test_pipeline_without_probabilities_raises_an_error(tmp_path):
    model = make_pipeline(extractor(), RidgeClassifier()).fit(X, Y)
    with pytest.raises(
        TypeError, match=r"'ridgeclassifier', RidgeClassifier.*predict_proba or a t"
    ):
        export_onnx(model, tmp_path / "model.onnx")


def test_other_models_raise_an_error(tmp_path):
    with pytest.raises(TypeError, match="Got LogisticRegression, but expected a fitted Pretr"):
        export_onnx(LogisticRegression(), tmp_path / "model.onnx")


@pytest.mark.parametrize("model", [extractor(), make_classifier()], ids=["extractor", "classifier"])
def test_model_must_be_fitted(model, tmp_path):
    with pytest.raises(NotFittedError):
        export_onnx(model, tmp_path / "model.onnx")


def test_path_must_end_in_onnx(pipeline):
    with pytest.raises(ValueError, match=r"Got path='model.pt', but expected .* '\.onnx'"):
        export_onnx(pipeline, "model.pt")


def test_unknown_type_of_weights_raises_an_error(pipeline, tmp_path):
    message = "Got weight_dtype='float61', but expected one of 'float32', 'float16'; did you mean"
    with pytest.raises(ValueError, match=message):
        export_onnx(pipeline, tmp_path / "model.onnx", weight_dtype="float61")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript", "skl2onnx"])
def test_missing_package_names_the_extra(pipeline, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"needs '{package}', which is not installed.*pip install 'sktransfer\[onnx\]'"
    with pytest.raises(ImportError, match=message):
        export_onnx(pipeline, tmp_path / "model.onnx")


@pytest.mark.slow
def test_exported_real_networks_agree_on_photographs(tmp_path):
    photographs = load_sample_images().images
    crops = [
        np.ascontiguousarray(photograph[top : top + 320, left : left + 400])
        for photograph in photographs
        for top, left in itertools.product((0, 50, 107), (0, 120, 240))
    ]
    y = np.repeat(["china", "flower"], 9)
    models = {
        "pipeline": make_pipeline(
            PretrainedFeatureExtractor(), StandardScaler(), LogisticRegression()
        ),
        "classifier": FineTunedImageClassifier(unfreeze=(0, 1), max_epochs=1, random_state=0),
    }
    tested = [*photographs, *crops, photographs[0][:, :200], photographs[1][:60]]
    for name, model in models.items():
        path = tmp_path / f"{name}.onnx"
        result = export_onnx(model.fit(crops, y), path, images=tested)
        assert result.max_difference < 1e-3
        outputs = run(path, [image[None] for image in tested])
        expected = model.predict_proba(tested)
        np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-3)
        assert outputs["label"].tolist() == model.predict(tested).tolist()


def node(script, folder):
    """Run a script in Node.js, in a folder; return its output, or None if it fails."""
    command = [shutil.which("node") or "node", "-e", script]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        return None
    return None if done.returncode else done.stdout


def photographs_and_model(path):
    """Export a pipeline to a file; return it and two photographs."""
    china, flower = load_sample_images().images
    model = make_pipeline(PretrainedFeatureExtractor(), StandardScaler(), LogisticRegression())
    model.fit([china, flower, china[:200], flower[:200]], ["china", "flower"] * 2)
    export_onnx(model, path)
    return [flower, china[:, :300]], model


def assert_same_answer(answer, photograph, model):
    """Compare an answer of a snippet, "label [probabilities]", with the model."""
    label, values = answer.strip().split(" ", 1)
    assert label == model.predict([photograph])[0]
    np.testing.assert_allclose(json.loads(values), model.predict_proba([photograph])[0], atol=1e-5)


def snippet(language):
    """Return the only block of a language on the page."""
    page = Path(__file__).parents[2] / "docs" / "export.md"
    (code,) = re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    return code


@pytest.mark.slow
def test_node_snippet_of_the_page_predicts_as_the_model(tmp_path):
    """Set NODE_PATH to a folder with the packages."""
    if node("require('onnxruntime-node'); require('sharp')", tmp_path) is None:
        pytest.skip("needs Node.js with onnxruntime-node and sharp")
    photographs, model = photographs_and_model(tmp_path / "model.onnx")
    for photograph in photographs:
        Image.fromarray(photograph).save(tmp_path / "flower.png")
        assert_same_answer(node(snippet("js"), tmp_path), photograph, model)


def test_python_server_of_the_page_predicts_transparent_images_as_the_model(pipeline, tmp_path):
    export_onnx(pipeline, tmp_path / "model.onnx")
    page = Path(__file__).parents[2] / "docs" / "export.md"
    (code,) = re.findall(r"```python\n(import io\n.*?def app.*?)```", page.read_text(), re.DOTALL)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = {"onnxruntime": SimpleNamespace(InferenceSession=lambda _: session), "np": np}
    exec(code, names)
    for mode in ("RGBA", "LA", "P"):
        image = Image.fromarray(X[0]).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        file = io.BytesIO()
        image.convert(mode).save(file, "PNG")
        body = file.getvalue()
        environ = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": len(body)}
        answer = json.loads(names["app"](environ, lambda *_: None)[0])
        (expected,) = pipeline.predict_proba([body])
        assert list(answer) == [*map(str, pipeline.classes_)]
        np.testing.assert_allclose([*answer.values()], expected, atol=1e-3)


# Appended to a page: send its answer to the server.
SENDER = """<script>
  const answer = document.getElementById("answer");
  const send = () => fetch("answer", { method: "POST", body: answer.textContent });
  new MutationObserver(send).observe(answer, { childList: true });
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and puts what is posted into the queue of the server."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answers.put(content.decode())
        self.send_response(204)
        self.end_headers()


@pytest.fixture
def server(tmp_path):
    """Serve a folder on this machine."""
    handler = functools.partial(Handler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.answers = queue.Queue()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.mark.slow
def test_browser_snippet_of_the_page_predicts_as_the_model(tmp_path, server):
    """Set NODE_PATH to a folder with the package."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    packages = Path(os.environ.get("NODE_PATH", "node_modules")).resolve()
    if browser is None or not (packages / "onnxruntime-web").is_dir():
        pytest.skip("needs Chromium and onnxruntime-web")
    photographs, model = photographs_and_model(tmp_path / "model.onnx")
    (tmp_path / "node_modules").symlink_to(packages)
    (tmp_path / "index.html").write_text(snippet("html") + SENDER)
    for number, photograph in enumerate(photographs):
        Image.fromarray(photograph).save(tmp_path / "flower.png")
        profile = tmp_path / f"profile{number}"  # without the cached image of another run
        command = [browser, "--headless", "--no-sandbox", f"--user-data-dir={profile}"]
        command.append(f"http://127.0.0.1:{server.server_port}/index.html")
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
            try:
                assert_same_answer(server.answers.get(timeout=120), photograph, model)
            finally:
                running.terminate()


@pytest.mark.parametrize("path", [None, LogisticRegression()])
def test_what_is_no_path_is_rejected(path):
    message = (
        rf"^Got {type(path).__name__} as the path, .* as in export_onnx\(model, 'model.onnx'\)$"
    )
    with pytest.raises(TypeError, match=message):
        export_onnx("model.onnx", path)
