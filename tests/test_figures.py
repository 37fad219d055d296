"""Figures in the README and the docs equal the committed results of the benchmarks."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# Page, the text around a figure, for which {} stands, and its path: file, then keys.
FIGURES = [
    ("README.md", "| sktransfer with `[openvino]` | {} |", "embedding variants sktransfer median"),
    ("README.md", 'precision="bfloat16"` | {} |', "embedding variants sktransfer_bfloat16 median"),
    ("README.md", "without `[openvino]` | {} |", "embedding variants sktransfer_torch median"),
    ("README.md", "channels last | {} (", "embedding variants fastai median"),
    ("README.md", "channels last | 45 ({} with", "embedding variants fastai_bfloat16 median"),
    ("README.md", "| embetter | {} |", "embedding variants embetter median"),
    ("README.md", "| a plain loop in torch | {} |", "embedding variants loop median"),
    ("README.md", "and batch size | {} (", "embedding variants tuned_loop median"),
    ("README.md", "and batch size | 59 ({} in", "embedding variants tuned_loop_bfloat16 median"),
    ("README.md", "with `[openvino]` | 178 | {} |", "embedding_xeon variants sktransfer median"),
    ("README.md", '"bfloat16"` | 295 | {} |', "embedding_xeon variants sktransfer_bfloat16 median"),
    ("README.md", "`[openvino]` | 155 | {} |", "embedding_xeon variants sktransfer_torch median"),
    ("README.md", "bfloat16 autocast) | {} (", "embedding_xeon variants fastai median"),
    ("README.md", "| 52 ({} with", "embedding_xeon variants fastai_bfloat16 median"),
    ("README.md", "| embetter | 38 | {} |", "embedding_xeon variants embetter median"),
    ("README.md", "loop in torch | 27 | {} |", "embedding_xeon variants loop median"),
    ("README.md", "in bfloat16) | {} (", "embedding_xeon variants tuned_loop median"),
    ("README.md", "in bfloat16) | 65 ({} in", "embedding_xeon variants tuned_loop_bfloat16 median"),
    ("README.md", "Classifier()` | {} (", "tuning_fold0 variants sktransfer fit_seconds"),
    ("README.md", "({} in later processes)", "tuning_fold0 variants sktransfer later_fit_seconds"),
    ("README.md", "later processes) | {} |", "tuning variants sktransfer accuracy"),
    ("README.md", "then the last blocks | {} |", "tuning_fold0 variants loop_288 fit_seconds"),
    ("README.md", "then the last blocks | 278 | {} |", "tuning variants loop_288 accuracy"),
    ("README.md", "fastest settings | {} |", "tuning_fold0 variants fastai fit_seconds"),
    ("README.md", "fastest settings | 123 | {} |", "tuning variants fastai accuracy"),
    ("README.md", "Classifier()` scores {}, and", "accuracy photographs default accuracy"),
    ("README.md", "of the same size {}.", "accuracy photographs probe accuracy"),
    ("README.md", "1,000 digits it scores {},", "accuracy digits default accuracy"),
    ("README.md", "on embeddings {} and on raw", "accuracy digits probe accuracy"),
    ("README.md", "and on raw pixels {}.", "accuracy digits pixels accuracy"),
    ("README.md", "default settings | {} |", "tuning_fold0 variants fastai_default fit_seconds"),
    (
        "README.md",
        "default settings | 199 | {} on",
        "tuning_fold0 variants fastai_default accuracy",
    ),
    ("README.md", "of the best in {} of", "accuracy test good"),
    ("README.md", "of the best in 27 of {} cases", "accuracy test cases"),
    ("README.md", "with 5 folds takes {} times", "search times_parts"),
    ("README.md", "are embedded {} times", "large_jpegs times_embedded"),
    ("README.md", "stored embeddings takes {} s", "store_read read_seconds"),
    ("README.md", "{} MB for 10,000 images", "growth sizes 10000 peak_mb"),
    ("README.md", "and {} MB for 100,000", "growth sizes 100000 peak_mb"),
    ("docs/fine_tuning.md", "5 folds, defaults | {};", "accuracy photographs default accuracy"),
    ("docs/fine_tuning.md", "of the same size {} |", "accuracy photographs probe accuracy"),
    ("docs/fine_tuning.md", "testing, defaults | {};", "accuracy digits default accuracy"),
    ("docs/fine_tuning.md", "classifier on embeddings {}, on", "accuracy digits probe accuracy"),
    ("docs/fine_tuning.md", "on raw pixels {} |", "accuracy digits pixels accuracy"),
    ("docs/fine_tuning.md", "345 photographs | {} s", "epoch sktransfer"),
    ("docs/embed_once.md", "in shuffled order in {} s", "store_read read_seconds"),
    ("docs/input_formats.md", "was {} MB for 10,000", "growth sizes 10000 peak_mb"),
    ("docs/input_formats.md", "and {} MB for 100,000", "growth sizes 100000 peak_mb"),
    ("docs/export.md", "was {} for a pipeline", "export pipeline_float32 max_difference"),
    (
        "docs/export.md",
        "{} for `FineTunedImageClassifier()` and 6",
        "export default_float32 max_difference",
    ),
    ("docs/export.md", "and {} for one with", "export own_size_float32 max_difference"),
    (
        "docs/export.md",
        "difference was {} for the pipeline",
        "export pipeline_float16 max_difference",
    ),
    (
        "docs/export.md",
        "{} for `FineTunedImageClassifier()` and 0",
        "export default_float16 max_difference",
    ),
    ("docs/export.md", "and {} for the one with", "export own_size_float16 max_difference"),
    (
        "docs/export.md",
        "within {} of `predict_proba`",
        "export pipeline_float32 web max_difference",
    ),
    (
        "docs/export.md",
        "for the pipeline and {} for",
        "export own_size_float32 web max_difference",
    ),
    (
        "docs/export.md",
        "by up to {}.",
        "export own_size_float32 node_with_sharp max_difference",
    ),
]

METHODS = {
    "source only": "source",
    '`batch_norm="adapt"`': "adapt",
    "CORAL on the tuned embeddings": "CORAL",
    "both: CORAL on the adapted embeddings": "adapt, CORAL",
    "`domain_adversarial=0.3`": "DANN",
    "`SelfTrainedImageClassifier`": "self-training",
    '`SelfTrainedImageClassifier` around `batch_norm="adapt"`': "adapt, self-training",
    "target labels": "target labels",
}

AUGMENTATIONS = {
    '`augment="standard"`, three views': "standard",
    '`augment="standard"`, seven views': "standard, 7 views",
    '`augment="industrial"`, three views': "industrial, 3 views",
    '`augment="industrial"`, seven views': "industrial",
}

STRATEGIES = {"used for choosing": "development", "used for testing": "test"}


def result(path):
    """Return the result at a path such as "accuracy_digits tuned accuracy"."""
    name, *keys = path.split()
    value = json.loads((RESULTS / f"{name}.json").read_text())
    for key in keys:
        value = value[key]
    return value


def page(name):
    """Return the text of a page, with spaces in place of line breaks."""
    return re.sub(r"\s+", " ", (ROOT / name).read_text())


def rounds_to(typed, value):
    """Return whether a value, rounded to the digits of a figure, equals it."""
    digits, _, exponent = typed.partition("e")
    scale = 10.0 ** int(exponent or 0)
    unit = 10.0 ** -len(digits.partition(".")[2])
    return abs(float(digits) - value / scale) <= unit / 2 + 1e-9


@pytest.mark.parametrize(("name", "text", "path"), FIGURES)
def test_figure_equals_the_benchmark_result(name, text, path):
    before, after = map(re.escape, text.split("{}"))
    (typed,) = re.findall(before + r"(\d+(?:\.\d+)?(?:e-\d+)?)" + after, page(name))
    assert rounds_to(typed, result(path)), (typed, result(path))


@pytest.mark.parametrize("row", METHODS)
def test_domain_row_equals_the_benchmark_result(row):
    cells = re.search(
        rf"\| {re.escape(row)} \| (0\.[^|]*) \| (0\.[^|]*) \|", page("docs/domains.md")
    )
    tasks = json.loads((RESULTS / "domain_shift.json").read_text())["tasks"]
    for cell, task in zip(cells.groups(), ("8 x 8 to MNIST", "photographs to edges"), strict=True):
        accuracy, std = cell.split(" +- ")
        assert rounds_to(accuracy, tasks[task][METHODS[row]]["accuracy"])
        assert rounds_to(std, tasks[task][METHODS[row]]["std"])


@pytest.mark.parametrize("row", AUGMENTATIONS)
def test_corruption_row_equals_the_benchmark_result(row):
    cells = re.search(rf"\| {re.escape(row)} \|(.*?)\|(.*?)\|(.*?)\|", page("docs/domains.md"))
    measured = result("industrial tuned accuracy")[AUGMENTATIONS[row]]
    for cell, key in zip(cells.groups(), ("clean", "one corruption", "all four"), strict=True):
        assert rounds_to(cell.strip(), measured[key])


@pytest.mark.parametrize("row", STRATEGIES)
def test_strategy_row_equals_the_benchmark_result(row):
    cells = re.search(rf"data sets {row} \|([\d |]+)\|", page("docs/strategy.md"))
    measured = result(f"strategies {STRATEGIES[row]}")
    always = [measured["always"][key] for key in ("frozen", "staged", "full", "scratch")]
    expected = [measured["cases"], measured["good"], *always]
    assert [int(cell) for cell in cells[1].split("|")[:6]] == expected
