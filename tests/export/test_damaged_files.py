"""A file that is damaged or crafted is refused, fast, with little memory, and runs no code."""

import hashlib
import io
import json
import os
import pickle
import resource
import stat
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from helpers import X, Y
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from sktransfer import (
    FineTunedImageClassifier,
    ModelFileError,
    PretrainedFeatureExtractor,
    load,
    save,
)
from sktransfer.export.archive import DESCRIPTION, TENSORS

MAX_SECONDS, MAX_BYTES = 1.0, 200 * 2**20
SETTINGS = {"image_size": 32, "cache": None}
ran = []


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A small file: a classifier without its frozen weights."""
    path = tmp_path_factory.mktemp("models") / "model.skt"
    classifier = FineTunedImageClassifier(unfreeze=0, augment=None, **SETTINGS)
    save(classifier.fit(X, Y), path, standalone=False)
    return path


@pytest.fixture(scope="module")
def pipeline_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "pipeline.skt"
    pipeline = make_pipeline(PretrainedFeatureExtractor(**SETTINGS), LogisticRegression())
    save(pipeline.fit(X, Y), path, standalone=False)
    return path


def assert_refused(path, message="Got .*, but "):
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ModelFileError, match=message) as caught:
        load(path)
    assert time.process_time() - start < MAX_SECONDS
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) < MAX_BYTES
    assert len(str(caught.value)) < 1500
    assert not ran


def test_no_flipped_bit_and_no_cut_is_overlooked(model_file, tmp_path):
    content, path = model_file.read_bytes(), tmp_path / "damaged.skt"
    load(model_file)
    rng = np.random.default_rng(0)
    positions = np.concatenate([rng.integers(0, 8 * len(content), 300), np.arange(64)])
    for position in (*positions, *(8 * len(content) - 1 - np.arange(0, 2000, 20))):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        assert_refused(path)
    for size in (0, 1, 3, 4, 30, *rng.integers(0, len(content), 60), len(content) - 1):
        path.write_bytes(content[:size])
        assert_refused(path)
    for longer in (content + b"\0", b"\0" + content, content + content):
        path.write_bytes(longer)
        assert_refused(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "another kind of file"),
        (b"PK\x05\x06" + bytes(18), "another kind of file"),
        (pickle.dumps({"model": 1}), "another kind of file"),
        (
            b"\x89PNG\r\n\x1a\n" + bytes(200),
            "another kind of file; expected a file that sktransfer",
        ),
    ],
)
def test_other_files_are_refused(content, problem, tmp_path):
    path = tmp_path / "other.skt"
    path.write_bytes(content)
    assert_refused(path, problem)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "gone.skt")
    with pytest.raises(OSError, match="directory"):
        load(tmp_path)


def entries_of(path):
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def craft(path, entries, *, method=zipfile.ZIP_STORED, records=True):
    """Write entries as an archive with the right digests, as an attacker can."""
    entries = [*entries]
    if records:  # the description records the digests of the other parts
        head = json.loads(dict(entries)[DESCRIPTION])
        head["sha256"] = {str(n): hashlib.sha256(c).hexdigest() for n, c in entries}
        entries = [(n, json.dumps(head).encode() if n == DESCRIPTION else c) for n, c in entries]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, content)
        archive.comment = b"sktransfer sha256 " + b"0" * 64
    seal(path, buffer.getvalue())


def seal(path, content):
    path.write_bytes(content[:-64] + hashlib.sha256(content[:-64]).hexdigest().encode())


class Attack:
    def __reduce__(self):
        return ran.append, (1,)


def symbolic_link():
    info = zipfile.ZipInfo("steps/0.skops")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name",
    ["../model.json", "/etc/passwd", "a.py", "steps/../x.skops", "model.json/", "evil.pkl"],
)
def test_names_that_no_saved_model_has_are_refused(model_file, name, tmp_path):
    craft(tmp_path / "crafted.skt", [*entries_of(model_file), (name, b"x")])
    assert_refused(tmp_path / "crafted.skt", "parts that no saved model has|cannot be read")
    assert [file.name for file in tmp_path.iterdir()] == ["crafted.skt"]


def test_parts_that_do_not_belong_to_the_model_are_refused(model_file, tmp_path):
    path = tmp_path / "crafted.skt"
    for name in ("steps/0.skops", symbolic_link()):
        craft(path, [*entries_of(model_file), (name, b"/etc/passwd")])
        if isinstance(name, zipfile.ZipInfo):
            craft(path, [*entries_of(model_file), (name, b"/etc/passwd")], records=False)
        assert_refused(path, "does not belong|does not have the recorded")
    with pytest.warns(UserWarning, match="Duplicate name"):
        craft(path, [*entries_of(model_file)] * 2)
    assert_refused(path, "parts that no saved model has")
    craft(path, [(n, c) for n, c in entries_of(model_file) if n != TENSORS])
    assert_refused(path)


def test_bombs_are_refused(model_file, tmp_path):
    path, entries = tmp_path / "bomb.skt", dict(entries_of(model_file))
    craft(path, {**entries, "steps/0.skops": bytes(2**28)}.items(), method=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    assert_refused(path, "compressed, or their sizes are wrong")
    # A size in the central directory that is larger than the file.
    craft(path, entries.items())
    content = bytearray(path.read_bytes())
    position = content.index(b"PK\x01\x02")
    for offset in (20, 24):
        content[position + offset : position + offset + 4] = (2**31).to_bytes(4, "little")
    seal(path, bytes(content))
    assert_refused(path, "sizes are wrong")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"format": "sktransfer model"}',
        b'{"format": "sktransfer model", "version": "1", "sha256": {}}',
        b'{"format": "sktransfer model", "version": 1, "sha256": {}}',
        b'{"format": "sktransfer model", "version": 1, "sha256": {}, "model": {"type": "os"}}',
        b"\xff\xfe",
        b'{"format": 1e999}',
    ],
)
def test_descriptions_without_a_model_are_refused(text, tmp_path):
    craft(tmp_path / "crafted.skt", [(DESCRIPTION, text)], records=False)
    assert_refused(tmp_path / "crafted.skt")


def test_later_format_asks_for_a_newer_release(model_file, tmp_path):
    entries = dict(entries_of(model_file))
    entries[DESCRIPTION] = entries[DESCRIPTION].replace(b'"version": 1', b'"version": 2')
    craft(tmp_path / "later.skt", entries.items())
    assert_refused(tmp_path / "later.skt", "format version 2.*install a newer sktransfer")


def leaves(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


VALUES = [None, True, -1, 10**12, 1.5, "", "../x", "os.system", [], {}, [[[1]]], {"tuple": 1}]


@pytest.mark.parametrize("file", ["model_file", "pipeline_file"])
def test_any_other_value_in_the_description_is_refused_or_harmless(file, request, tmp_path):
    entries, path = dict(entries_of(request.getfixturevalue(file))), tmp_path / "crafted.skt"
    rng = np.random.default_rng(0)
    positions = [*leaves(json.loads(entries[DESCRIPTION])["model"], ("model",))]
    refused = 0
    for _ in range(150):
        tree = json.loads(entries[DESCRIPTION])
        *above, last = positions[rng.integers(len(positions))]
        parent = tree
        for key in above:
            parent = parent[key]
        if rng.random() < 0.2 and isinstance(parent, dict):
            del parent[last]
        else:
            parent[last] = VALUES[rng.integers(len(VALUES))]
        craft(path, {**entries, DESCRIPTION: json.dumps(tree).encode()}.items())
        start = time.process_time()
        try:
            load(path)
        except ModelFileError:
            refused += 1
        assert time.process_time() - start < MAX_SECONDS
        assert not ran
    assert refused > 50


def change(entries, edit):
    tensors = load_tensors(entries[TENSORS])
    edit(tensors)
    return {**entries, TENSORS: save_tensors(tensors)}.items()


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda t: t["tuned 0/head.weight"].fill_(np.nan), "not finite"),
        (lambda t: t.update({"tuned 0/head.weight": torch.zeros(3, 1)}), "do not fit"),
        (lambda t: t.update({"tuned 0/head.bias": torch.zeros(1)}), "do not fit"),
        (lambda t: t.update({"tuned 0/head.bias": torch.zeros(3, dtype=torch.float64)}), "not fit"),
        (lambda t: t.pop("tuned 0/head.bias"), "incomplete"),
        (lambda t: t.update({"tuned 0/block3.x": torch.zeros(1)}), "do not fit"),
        (lambda t: t.update({"other/x": torch.zeros(1)}), "does not belong to the model"),
    ],
)
def test_wrong_tensors_are_refused(model_file, edit, problem, tmp_path):
    craft(tmp_path / "crafted.skt", change(dict(entries_of(model_file)), edit))
    assert_refused(tmp_path / "crafted.skt", problem)


def lie(content, position, value):
    return content[:position] + value + content[position + len(value) :]


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: b"",
        lambda c: c[:20],
        lambda c: (2**62).to_bytes(8, "little") + c[8:],
        lambda c: c.replace(b'"F32"', b'"F99"', 1),
        lambda c: c.replace(b'"shape":[3', b'"shape":[9', 1),
        lambda c: pickle.dumps(Attack()),
    ],
)
def test_header_of_the_tensors_cannot_lie(model_file, edit, tmp_path):
    entries = dict(entries_of(model_file))
    changed = edit(entries[TENSORS])
    assert changed != entries[TENSORS]
    craft(tmp_path / "crafted.skt", {**entries, TENSORS: changed}.items())
    assert_refused(tmp_path / "crafted.skt")


def test_network_of_another_architecture_is_refused(tmp_path):
    extractor = PretrainedFeatureExtractor("resnet18", weights=None, **SETTINGS)
    save(extractor.fit(X), tmp_path / "model.skt")
    entries = dict(entries_of(tmp_path / "model.skt"))
    for name in ("resnet34", "efficientnet_lite0", "no such network", "timm:resnet18d"):
        text = entries[DESCRIPTION].replace(
            b'"backbone": "resnet18"', b'"backbone": "%s"' % name.encode()
        )
        craft(tmp_path / "crafted.skt", {**entries, DESCRIPTION: text}.items())
        with pytest.raises(ModelFileError, match="network differs"):
            load(tmp_path / "crafted.skt")


def skops_with(function):
    from sklearn.preprocessing import FunctionTransformer
    from skops.io import dumps

    return dumps(FunctionTransformer(function, kw_args={"a": 1}))


def inner(files, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (partial(pickle.dumps, Attack()), "cannot be read"),
        (partial(skops_with, os.system), "types that are not trusted.*system"),
        (partial(skops_with, eval), "types that are not trusted.*eval"),
        (partial(inner, {"schema.json": b"{}"}), "cannot be read"),
        (partial(inner, {"schema.json": b"[" * 100_000}), "cannot be read"),
        (partial(inner, {"schema.json": bytes(2**28)}, zipfile.ZIP_DEFLATED), "cannot be read"),
        (lambda: b"", "cannot be read"),
    ],
)
def test_steps_with_code_are_refused(pipeline_file, step, problem, tmp_path):
    entries = {**dict(entries_of(pipeline_file)), "steps/0.skops": step()}
    craft(tmp_path / "crafted.skt", entries.items())
    assert_refused(tmp_path / "crafted.skt", problem)
