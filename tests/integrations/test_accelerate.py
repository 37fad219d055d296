"""Fits in two processes of Accelerate: results of one process, and failures that end all."""

import sys

import accelerate_helpers as helpers
import numpy as np
import pytest
from accelerate_helpers import FITS, N, describe, run_together
from helpers import (
    BROKEN_ROWS,
    X_TEST,
    CountingTiny,
    Tiny,
    X,
    Y,
    counted,
    equal_states,
    make_classifier,
    net_state,
)

from sktransfer.integrations.accelerate import data_parallel
from sktransfer.utils.processes import ALONE, current_processes

accelerate = pytest.importorskip("accelerate")

# Seconds after which all processes have ended: an exchange would wait for half an hour.
SOON = 30


def close(actual, expected, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def check_equal_everywhere(results):
    """Check that all processes have the same classifier, bit for bit."""
    for other in results[1:]:
        assert other["weights"].keys() == results[0]["weights"].keys()
        for name, weights in results[0]["weights"].items():
            np.testing.assert_array_equal(other["weights"][name], weights)
        for name, outputs in results[0]["outputs"].items():
            np.testing.assert_array_equal(other["outputs"][name], outputs)
        for name in ("losses", "best_epochs", "averaging", "decision", "n_errors"):
            assert other[name] == results[0][name]
        assert b"accelerate" not in other["pickle"]


# --- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    results, _ = run_together("all_fits", tmp_path_factory.mktemp("fits"))
    return results


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FITS)
def test_two_processes_train_the_classifier_of_one(fits, name):
    results = [result[name] for result in fits]
    check_equal_everywhere(results)
    two, one = results[0], describe(helpers.fit(name))
    assert len(two["losses"]) == len(one["losses"]) > 0
    for actual, expected in zip(two["losses"], one["losses"], strict=True):
        close(actual, expected, rtol=1e-5, atol=1e-7)
    for weights, expected in one["weights"].items():
        close(two["weights"][weights], expected, atol=1e-6)
    close(two["probabilities"], one["probabilities"])
    assert two["decision"] == one["decision"]
    close(two["averaging"], one["averaging"])
    assert two["best_epochs"] == one["best_epochs"]
    # Otherwise the weights are those before training.
    if any(two["best_epochs"]) and two["averaging"][0]:
        blocks = [weights for key, weights in one["weights"].items() if "blocks" in key]
        untrained = {tensor.numpy().tobytes() for tensor in Tiny().state_dict().values()}
        assert any(weights.tobytes() not in untrained for weights in blocks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_search_and_resumed_fit_work_in_two_processes(fits):
    best = helpers.search().best_params_
    assert [result["search"] for result in fits] == [best, best]
    checkpoints, epochs, classifiers = zip(*(result["checkpoint"] for result in fits), strict=True)
    assert checkpoints == (1, 0), "only the main process writes"
    assert epochs == (4, 4)
    check_equal_everywhere(classifiers)  # with the seed that the main process drew


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    results, _ = run_together("failures", tmp_path_factory.mktemp("failures"))
    return results


STOPPED = "Process 1 of 2 has stopped with {}. This one stops, too, because they train together"
SAME = "but all must call fit with the same ones"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "errors", "messages"),
    [
        (
            "error",
            ("RuntimeError", "ValueError"),
            (STOPPED.format("ValueError: the disk is on fire"), "the disk is on fire"),
        ),
        (
            "error outside of a fit",
            ("RuntimeError", "ValueError"),
            (STOPPED.format("ValueError: the disk is on fire"), "the disk is on fire"),
        ),
        (
            "interrupt",
            ("RuntimeError", "KeyboardInterrupt"),
            (STOPPED.format("KeyboardInterrupt"), ""),
        ),
        ("all fail", ("ValueError",) * 2, ("the disk is on fire",) * 2),
        ("one stops early", ("RuntimeError",) * 2, ("do different things at the same time",) * 2),
        ("diverges", ("FloatingPointError",) * 2, ("Got a loss that is not finite",) * 2),
        ("other data", ("ValueError",) * 2, (SAME,) * 2),
        ("other parameters", ("ValueError",) * 2, (SAME,) * 2),
        ("adversarial", ("ValueError",) * 2, ("Got domain_adversarial=0.1 with 2 processes",) * 2),
        ("learned statistics", ("ValueError",) * 2, ("Got batch_norm='train' and",) * 2),
        ("broken images", ("ImageError",) * 2, ("Got 4 images that cannot be read",) * 2),
        (
            "broken images in each epoch",
            ("ImageError",) * 2,
            ("Got 4 images that cannot be read",) * 2,
        ),
    ],
)
def test_failure_ends_all_processes_soon(failures, name, errors, messages):
    for result, error, message in zip(failures, errors, messages, strict=True):
        actual_error, actual_message, seconds = result[name]
        assert actual_error == error
        assert message in actual_message
        assert seconds < SOON


@pytest.mark.slow
def test_broken_images_are_left_out_after_other_fits_have_failed(failures):
    results = [result["skipped"] for result in failures]
    check_equal_everywhere(results)
    assert results[0]["n_errors"] == len(BROKEN_ROWS)


@pytest.mark.slow
def test_process_that_is_killed_ends_the_other_soon(tmp_path):
    (result, nothing), _ = run_together("killed", tmp_path)
    assert nothing is None
    error, message, seconds = result
    assert error == "RuntimeError"
    assert "Process 0 of 2 has lost the connection to another one" in message
    assert seconds < SOON


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_embed_each_image_once_in_total(tmp_path, log):
    scores, _ = run_together("counted_fit", tmp_path)
    assert scores[0] == scores[1]
    n_embedded = counted(tmp_path / "images.log")
    log.unlink()
    store = tmp_path / "store"  # other tests may have used the session's
    classifier = make_classifier(lambda: CountingTiny(log), cache=store).fit(X[:N], Y[:N])
    classifier.score(X_TEST, helpers.Y_TEST)
    n_alone = counted(log)
    # Each process has predicted, too.
    assert n_embedded == n_alone + len(X_TEST)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_tune_a_real_network_like_one(tmp_path):
    results, outputs = run_together("real_network", tmp_path)
    check_equal_everywhere(results)
    one = describe(helpers.fit_on_photographs(), helpers.crops(10, seed=1)[0])
    two = results[0]
    np.testing.assert_array_equal(
        two["outputs"]["predict"], one["outputs"]["predict"], "held-out photographs"
    )
    close(two["probabilities"], one["probabilities"])
    assert "head" in outputs[0]
    assert "head" not in outputs[1], "only the main process shows bars"


# --- one process ---------------------------------------------------------------------------------


def test_one_process_fits_as_without_accelerate():
    options = {"unfreeze": (0, 1), "max_epochs": 1, "n_views": 1}
    expected = net_state(make_classifier(**options).fit(X[:N], Y[:N]))
    with data_parallel(accelerate.Accelerator(cpu=True)):
        classifier = make_classifier(**options).fit(X[:N], Y[:N])
    assert equal_states(net_state(classifier), expected)
    assert current_processes() is ALONE


def test_unsuitable_accelerator_is_rejected(monkeypatch):
    with pytest.raises(TypeError, match=r"Got None, but expected an accelerate\.Accelerator"):
        data_parallel(None).__enter__()
    accelerator = accelerate.Accelerator(cpu=True)
    for name, value, message in [
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps=2, but .* batch_size"),
        ("mixed_precision", "bf16", "mixed_precision='bf16', but .*precision='bfloat16'"),
        ("distributed_type", accelerate.DistributedType.FSDP, "Got an Accelerator for FSDP"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(accelerate.Accelerator, name, value)
            with pytest.raises(ValueError, match=message):
                data_parallel(accelerator).__enter__()
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'sktransfer\[accelerate\]'"):
        data_parallel(accelerator).__enter__()
