"""skl2onnx converts estimators that contain an extractor."""

import numpy as np
import onnxruntime
import pytest
import skl2onnx
from export_helpers import EXAMPLES
from helpers import Tiny, X, Y
from skl2onnx.common.data_types import UInt8TensorType
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, register_onnx_converter


def extractor(**parameters):
    return PretrainedFeatureExtractor(Tiny, cache=None, **parameters)


@pytest.mark.slow_cases("two extractors")
@pytest.mark.parametrize(
    "embed",
    [extractor(), make_union(extractor(), extractor(layer="0", image_size=24))],
    ids=["one extractor", "two extractors"],
)
def test_converted_pipeline_predicts_the_same(embed):
    register_onnx_converter()
    register_onnx_converter()  # again, as in a notebook
    model = make_pipeline(embed, StandardScaler(), LogisticRegression()).fit(X, Y)
    graph = skl2onnx.to_onnx(
        model,
        initial_types=[("images", UInt8TensorType([None, None, None, 3]))],
        options={id(model): {"zipmap": False}},
        target_opset={"": 18, "ai.onnx.ml": 3},
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    rows = [session.run(None, {"images": image[None]}) for image in EXAMPLES]
    labels, probabilities = map(np.concatenate, zip(*rows, strict=True))
    np.testing.assert_allclose(probabilities, model.predict_proba(EXAMPLES), atol=1e-5)
    assert labels.tolist() == model.predict(EXAMPLES).tolist()
