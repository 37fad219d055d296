"""A fit that is killed resumes from its checkpoint and ends with the same weights."""

import contextlib
import random
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from helpers import X_TEST, Interrupt, PowerCut, X, Y, make_classifier

from sktransfer.finetuning import train_stage as training

SCRIPT = """
import io, os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from skorch.callbacks import Callback
from helpers import X, Y, make_classifier
from sktransfer.backbones.weights import to_tensors

left = {events}
save, replace = torch.save, os.replace

def strike(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def save_in_two_parts(content, file):
    buffer = io.BytesIO()
    save(content, buffer)
    half = buffer.tell() // 2
    for part in (buffer.getvalue()[:half], buffer.getvalue()[half:]):
        file.write(part)
        file.flush()
        strike()

def replace_slowly(*paths):
    strike()
    replace(*paths)
    strike()

class Deadly(Callback):
    on_epoch_begin = on_batch_begin = on_batch_end = on_epoch_end = strike

torch.save, os.replace = save_in_two_parts, replace_slowly
classifier = make_classifier(
    unfreeze=(0, 1, 2), max_epochs=8, mixup=0.2, n_iter_no_change=8,
    checkpoint_dir={folder!r}, callbacks=[Deadly()],
)
classifier.fit(X, Y)
stages = [{{k: v for k, v in s.items() if k != "seconds"}} for s in classifier.stages_]
losses = [float(row["train_loss"]) for row in classifier.history_]
save([to_tensors(classifier._tuned.weights), stages, losses], {result!r})
"""


def fit_in_a_process(folder, result, events=0):
    """Fit in a process that is killed at the `events`-th batch, epoch or checkpoint write."""
    tests = str(Path(helpers.__file__).parent)
    script = SCRIPT.format(tests=tests, folder=str(folder), result=str(result), events=events)
    return subprocess.run([sys.executable, "-c", script]).returncode


@pytest.mark.slow
def test_fit_resumed_after_ten_kills_gives_the_same_result(tmp_path):
    assert fit_in_a_process(tmp_path / "undisturbed", tmp_path / "expected.pt") == 0
    expected = torch.load(tmp_path / "expected.pt", weights_only=True)

    moments = random.Random(0)
    for _ in range(10):
        events = moments.randint(1, 25)  # an epoch has 15 of them
        assert (
            fit_in_a_process(tmp_path / "killed", tmp_path / "none.pt", events) == -signal.SIGKILL
        )
    assert fit_in_a_process(tmp_path / "killed", tmp_path / "resumed.pt") == 0

    resumed = torch.load(tmp_path / "resumed.pt", weights_only=True)
    assert resumed[1:] == expected[1:]
    assert resumed[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(tensor, resumed[0][name]), name


def test_fit_resumed_in_any_epoch_gives_the_same_result(tmp_path):
    settings = {"max_epochs": 3, "checkpoint_dir": str(tmp_path), "n_iter_no_change": 9}
    expected = (
        make_classifier(**{**settings, "checkpoint_dir": None}).fit(X, Y).predict_proba(X_TEST)
    )
    for _ in range(20):
        classifier = make_classifier(**settings, callbacks=[PowerCut(1)])
        with contextlib.suppress(RuntimeError):
            classifier.fit(X, Y)
            break
    assert (classifier.predict_proba(X_TEST) == expected).all()
    assert len(list(tmp_path.glob("*.pt"))) == 1

    finished = make_classifier(**settings, callbacks=[PowerCut(0)]).fit(X, Y)  # no epoch is left
    assert (finished.predict_proba(X_TEST) == expected).all()


def test_fit_interrupted_from_the_keyboard_is_resumed(tmp_path):
    settings = {"max_epochs": 5, "n_iter_no_change": 9}
    expected = make_classifier(**settings).fit(X, Y).predict_proba(X_TEST)
    settings["checkpoint_dir"] = str(tmp_path)
    with pytest.warns(UserWarning, match="interrupted in stage"):
        make_classifier(**settings, callbacks=[Interrupt()]).fit(X, Y)
    assert (make_classifier(**settings).fit(X, Y).predict_proba(X_TEST) == expected).all()


def test_fit_interrupted_while_saving_is_resumed(tmp_path, monkeypatch):
    settings = {"checkpoint_dir": str(tmp_path), "early_stopping": False}
    expected = make_classifier(early_stopping=False).fit(X, Y).predict_proba(X_TEST)
    save, seen = training.save_checkpoint, []

    def interrupted(path, content):
        seen.append(content["stage"])
        if len(seen) == 3:
            raise KeyboardInterrupt
        save(path, content)

    monkeypatch.setattr(training, "save_checkpoint", interrupted)
    with pytest.warns(UserWarning, match="interrupted in stage 'last block'"):
        classifier = make_classifier(**settings).fit(X, Y)
    assert [stage["epochs"] for stage in classifier.stages_] == [0, len(classifier.history_)]
    assert (make_classifier(**settings).fit(X, Y).predict_proba(X_TEST) == expected).all()


def test_resumed_fit_without_a_seed_keeps_the_drawn_seed(tmp_path):
    settings = {"max_epochs": 5, "random_state": None, "checkpoint_dir": str(tmp_path)}
    with pytest.warns(UserWarning, match="interrupted in stage"):
        make_classifier(**settings, callbacks=[Interrupt()]).fit(X, Y)
    seed = torch.load(next(tmp_path.glob("*.pt")), weights_only=True)["seed"]
    resumed = make_classifier(**settings).fit(X, Y).predict_proba(X_TEST)
    expected = make_classifier(max_epochs=5, random_state=seed).fit(X, Y).predict_proba(X_TEST)
    assert (resumed == expected).all()
    assert len(list(tmp_path.glob("*.pt"))) == 1
