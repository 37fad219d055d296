"""Images at URLs have the embeddings of the same files on disk, whatever the network does."""

import collections
import copy
import http.server
import os
import pickle
import sys
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers import Items, Tiny, colored_images, encoded, images, make_classifier
from PIL import Image
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor
from sktransfer.data import remote
from sktransfer.data.decoding import may_be_transparent
from sktransfer.data.images import as_images, learn_pixel_range
from sktransfer.data.items import describe
from sktransfer.data.remote import RemoteFile, as_remote_file
from sktransfer.transforms.loader import ImageErrors, ImageReader
from sktransfer.transforms.views import Views
from sktransfer.utils.errors import ImageError

fsspec = pytest.importorskip("fsspec")

CONTENTS = [encoded(Image.fromarray(image)) for image in images(6)]
MISSING = "There is no such object. Correct the URL, or leave it out."


class Server(http.server.ThreadingHTTPServer):
    """A web server on this machine, whose objects may be missing, slow, refused or cut off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects = {f"/{row}.png": content for row, content in enumerate(CONTENTS)}
        self.tags, self.times, self.lengths = True, False, True
        # By path: the status of all answers, answers that break off, seconds before an answer.
        self.statuses, self.drops, self.delays = {}, collections.Counter(), {}
        self.requests = []
        self.at_once = self.most_at_once = 0

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"

    def count(self, method):
        return sum(method == requested for requested, _ in self.requests)

    def handle_error(self, request, address):
        """Say nothing: clients that do not wait close their connection."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        server, path = self.server, urlsplit(self.path).path
        with self.lock:
            server.requests.append((self.command, path))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.delays.get(path, 0))
            self.send(server, path, with_body)
        finally:
            with self.lock:
                server.at_once -= 1

    def send(self, server, path, with_body):
        status = server.statuses.get(path, 200 if path in server.objects else 404)
        content = server.objects.get(path, b"") if status == 200 else b"no"
        self.send_response(status)
        if server.lengths:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.close_connection = True
        if server.tags:
            self.send_header("ETag", f'"{hash(content)}"')
        if server.times:
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        if with_body and server.drops[path] > 0:
            server.drops[path] -= 1
            content, self.close_connection = content[: len(content) // 2], True
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    pytest.importorskip("aiohttp")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def urls(server):
    return [server.url(f"{row}.png") for row in range(len(CONTENTS))]


@pytest.fixture
def memory():
    """Return the URLs of images in memory."""
    filesystem = fsspec.filesystem("memory")
    for row, content in enumerate(CONTENTS):
        filesystem.pipe_file(f"/bucket/{row}.png", content)
    yield [f"memory://bucket/{row}.png" for row in range(len(CONTENTS))]
    filesystem.rm("/bucket", recursive=True)


@pytest.fixture
def files(tmp_path):
    """Return the paths of the same images on disk."""
    for row, content in enumerate(CONTENTS):
        (tmp_path / f"{row}.png").write_bytes(content)
    return [str(tmp_path / f"{row}.png") for row in range(len(CONTENTS))]


@pytest.fixture
def quick(monkeypatch):
    """Do not wait between attempts."""
    monkeypatch.setattr(remote, "_PAUSE", 0.0)


def embed(X, **parameters):
    return PretrainedFeatureExtractor(Tiny(), **{"cache": None, **parameters}).fit_transform(X)


def keys(X):
    rows = as_images(X)
    return [rows.fingerprint(row) for row in range(len(rows))]


# Containers


def test_urls_have_the_embeddings_of_files_in_all_containers(memory, files):
    expected = embed(files)
    containers = [
        memory,
        np.array(memory),
        np.array(memory, dtype=object),
        pd.Series(memory),
        pd.DataFrame({"image": memory}),
        pa.array(memory),
        [{"bytes": None, "path": url} for url in memory],
        [(url, 0) for url in memory],
        Items(memory),
        [memory[0], *files[1:3], CONTENTS[3], *memory[4:]],
    ]
    for container in containers:
        assert (embed(container) == expected).all()


def test_urls_of_files_have_embeddings_and_keys_of_paths(files):
    urls = [f"file://{path}" for path in files]
    assert (embed(urls) == embed(files)).all()
    assert keys(urls) == keys(files)


def test_urls_of_files_may_be_encoded_or_not(tmp_path):
    for name in ("my cat.png", "100%25.png", "a#1.png"):
        (tmp_path / name).write_bytes(CONTENTS[0])
        assert as_images([f"file://{tmp_path}/{name}"])[0].shape == (20, 20, 3)
    assert as_images([f"file://{tmp_path}/my%20cat.png"])[0].shape == (20, 20, 3)
    with pytest.raises(ImageError, match="There is no such file"):
        as_images([f"file://{tmp_path}/dog.png"])[0]


def test_members_of_archives_at_urls_are_read(memory, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("0.png", CONTENTS[0])
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe_file("/bucket/images.zip", (tmp_path / "images.zip").read_bytes())
    archived = "zip://0.png::memory://bucket/images.zip"
    assert (as_images([archived])[0] == as_images([CONTENTS[0]])[0]).all()


def test_bytes_of_a_dict_take_precedence_over_its_url():
    item = {"bytes": CONTENTS[0], "path": "https://no.invalid/0.png"}
    assert (embed([item, item]) == embed([CONTENTS[0], CONTENTS[0]])).all()


def test_classifier_is_fitted_to_urls(memory, files):
    y = [0, 1, 0, 1, 0, 1]
    by_url, by_path = (
        make_classifier(Tiny(), unfreeze=(0, 1), max_epochs=1, early_stopping=False).fit(X, y)
        for X in (memory, files)
    )
    np.testing.assert_array_equal(by_url.predict_proba(memory), by_path.predict_proba(files))
    assert by_url.predict(memory[:1]).shape == (1,)


# Names and messages


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://host/a.jpg?X-Amz-Date=1&X-Amz-Signature=2&id=3", "https://host/a.jpg?id=3"),
        ("https://host/a.jpg?X-Goog-Signature=2&X-Goog-Expires=9", "https://host/a.jpg"),
        ("https://host/a.jpg?sv=2024&se=2026&sp=r&sig=x%3D", "https://host/a.jpg"),
        ("https://host/a.jpg?Expires=1&Signature=x&Key-Pair-Id=K", "https://host/a.jpg"),
        ("https://host/image?id=3&sv=4", "https://host/image?id=3&sv=4"),
        ("ftp://me:secret@host/a.jpg", "ftp://me@host/a.jpg"),
        ("abfs://container@account/a.jpg", "abfs://container@account/a.jpg"),
        ("s3://bucket/a.jpg?sig=1", "s3://bucket/a.jpg?sig=1"),
    ],
)
def test_name_is_the_url_without_password_and_signature(url, name):
    assert RemoteFile(url).name == name


def test_messages_hide_passwords_and_queries():
    assert describe("https://me:secret@host/a.jpg?token=secret") == "https://me@host/a.jpg?..."
    assert describe("s3://bucket/a.jpg") == "s3://bucket/a.jpg"


@pytest.mark.parametrize(
    "text", ["C:/cat.jpg", "a:b.jpg", "x/http:/cat.jpg", "12:30.jpg", "data:x"]
)
def test_paths_and_other_strings_are_not_urls(text):
    assert as_remote_file(text) is None


def test_missing_fsspec_is_an_import_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    expected = (
        "An image at a URL needs 'fsspec', which is not installed. "
        r"Install it with: pip install 'sktransfer\[remote\]'"
    )
    with pytest.raises(ImportError, match=expected):
        embed(["memory://a.png", "memory://b.png"], on_error="nan")


def test_missing_package_of_a_protocol_is_an_import_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "libarchive", None)
    with pytest.raises(ImportError, match="An image at a URL of libarchive:// needs another"):
        as_images(["libarchive://a.png::memory://x"])[0]


def test_unknown_protocol_is_an_image_error():
    with pytest.raises(ImageError, match="Got a URL of foo://, a protocol that fsspec does not"):
        as_images(["foo://bucket/a.png"])[0]


# Keys


def test_keys_follow_the_content_in_memory(memory):
    before = keys(memory)
    assert len(set(before)) == len(memory)
    assert keys(memory) == before
    fsspec.filesystem("memory").pipe_file("/bucket/0.png", CONTENTS[1])
    assert keys(memory)[0] != before[0]
    assert keys(memory)[1:] == before[1:]


@pytest.mark.parametrize("tags", [True, False])
def test_changed_object_is_embedded_anew(server, urls, store, tags):
    server.tags, server.times = tags, not tags
    first = embed(urls, cache=store)
    n_read = server.count("GET")
    assert (embed(urls, cache=store) == first).all()
    assert server.count("GET") == n_read
    server.objects["/0.png"] = encoded(Image.fromarray(images(1, side=24, seed=9)[0]))
    changed = embed(urls, cache=store)
    assert (changed[0] != first[0]).any()
    assert (changed[1:] == first[1:]).all()
    assert store.info().computed == len(urls) + 1


def test_content_is_hashed_if_the_server_says_nothing(server, urls):
    server.tags = False
    before = keys(urls)
    server.objects["/0.png"] = server.objects["/1.png"]
    assert server.count("GET") == len(urls)
    after = keys(urls)
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_newly_signed_urls_have_the_same_keys(urls):
    first, second = ([f"{url}?Expires={n}&Signature=x{n}" for url in urls] for n in (1, 2))
    assert keys(first) == keys(second) == keys(urls)
    assert len(set(keys([f"{urls[0]}?id={n}" for n in (1, 2)]))) == 2


def test_metadata_is_requested_once_and_in_parallel(server, urls):
    server.delays = dict.fromkeys(server.objects, 0.2)
    rows = as_images(urls * 2)
    start = time.perf_counter()
    assert rows.fingerprint(0) == rows.fingerprint(len(urls))
    for row in range(len(rows)):
        rows.take([row]).fingerprint(0)
    assert time.perf_counter() - start < 0.2 * len(urls)
    assert server.count("HEAD") == len(urls)
    assert server.count("GET") == 0


def test_metadata_is_requested_once_if_images_are_hashed_on_threads(server, urls, store):
    X = [*images(62), *urls]  # in two parts, each for a thread
    extractor = PretrainedFeatureExtractor(Tiny(), cache=store, n_jobs=4).fit(X)
    server.requests.clear()
    server.delays = dict.fromkeys(server.objects, 0.2)
    extractor.transform(X)
    assert server.count("HEAD") == len(urls)


# Reading


def test_web_server_gives_the_embeddings_of_files(urls, files, store):
    expected = embed(files)
    assert (embed(urls) == expected).all()
    assert (embed(urls, cache=store) == expected).all()


def test_more_images_are_read_at_once_than_there_are_threads(server, urls):
    server.delays = dict.fromkeys(server.objects, 0.2)
    reader = ImageReader(Views(as_images(urls), Tiny.preprocessing), 1, ImageErrors("raise"))
    assert [rows for rows, _ in reader.batches(range(len(urls)), 2)] == [[0, 1], [2, 3], [4, 5]]
    assert server.most_at_once > 2
    assert server.count("GET") == len(urls)


def test_views_of_an_image_read_it_once(server, urls):
    views = Views(as_images(urls), Tiny.preprocessing, n_views=3)
    reader = ImageReader(views, 2, ImageErrors("raise"))
    assert sum(len(rows) for rows, _ in reader.batches(range(len(views)), 3)) == 4 * len(urls)
    assert server.count("GET") == len(urls)
    assert views.images.remote._started == {}


def test_dropped_connection_is_tried_again(server, urls, files, quick):
    extractor = PretrainedFeatureExtractor(Tiny(), cache=None).fit(urls)
    server.drops["/2.png"] = 2
    assert (extractor.transform(urls) == embed(files)).all()
    assert server.drops["/2.png"] == 0


def test_connection_that_always_breaks_off_is_an_error(server, urls, quick):
    server.drops["/2.png"] = 1000
    with pytest.raises(ImageError) as caught:
        as_images(urls)[2]
    assert caught.value.row == 2
    assert caught.value.reason.startswith("The connection failed: ClientPayloadError")
    assert caught.value.reason.endswith("Check the network, or try again later. Tried 3 times.")
    assert server.count("GET") == 3


def test_truncated_object_is_an_error(memory, monkeypatch, quick):
    rows = as_images(memory)
    rows.fingerprint(0)
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")), "cat_file", lambda *args, **options: CONTENTS[0][:100]
    )
    with pytest.raises(ImageError, match=r"got 100 bytes, but expected 1,\d+\. Check the network"):
        rows[0]


def test_slow_server_is_an_error(server, urls, monkeypatch, quick):
    monkeypatch.setattr(remote, "_TIMEOUT", 0.1)
    server.delays["/1.png"] = 1.0
    assert as_images(urls)[0].shape == (20, 20, 3)
    with pytest.raises(ImageError, match=r"No answer within 0.1 s\. Check .* Tried 3 times"):
        as_images(urls)[1]


def test_busy_server_is_asked_again_but_not_after_a_refusal(server, urls, quick):
    server.statuses = {"/0.png": 503, "/1.png": 403, "/2.png": 400}
    reasons = []
    for row in range(3):
        with pytest.raises(ImageError) as caught:
            as_images(urls)[row]
        reasons.append(caught.value.reason)
    assert reasons == [
        "The server answered with status 503. Try again later. Tried 3 times.",
        "Access was refused (status 403). Check your credentials and permissions, and whether a "
        "signed URL has expired.",
        "The server answered with status 400. Try again later.",
    ]
    assert collections.Counter(path for _, path in server.requests) == {
        "/0.png": 3, "/1.png": 1, "/2.png": 1
    }  # fmt: skip


@pytest.mark.parametrize("stored", [True, False])
def test_all_broken_urls_are_named_at_once(server, urls, store, stored, quick):
    server.statuses = {"/1.png": 403}
    X = [*urls, server.url("none.png"), "nowhere.png"]
    cache = store if stored else None
    with pytest.raises(ImageError) as caught:
        embed(X, cache=cache)
    assert [error.row for error in caught.value.errors] == [1, 6, 7]
    reasons = [error.reason for error in caught.value.errors]
    assert "403" in reasons[0]
    assert reasons[1].startswith("There is no such object")
    broken = embed(X, cache=cache, on_error="nan")
    assert np.isnan(broken).all(axis=1).tolist() == [row in (1, 6, 7) for row in range(8)]


def test_missing_key_and_folder_in_memory_are_errors(memory):
    for function in (as_images([*memory, "memory://bucket/9.png"]).fingerprint, as_images):
        with pytest.raises(ImageError, match=MISSING):
            function(6) if function is not as_images else as_images(["memory://bucket/9.png"])[0]
    with pytest.raises(ImageError, match="Got a folder, but expected an image"):
        as_images(["memory://bucket"]).fingerprint(0)


def test_classifier_names_all_missing_urls(memory):
    X = [*memory, "memory://bucket/8.png", "memory://bucket/9.png"]
    with pytest.raises(ImageError) as caught:
        make_classifier(Tiny(), unfreeze=(0,)).fit(X, [0, 1] * 4)
    assert [error.row for error in caught.value.errors] == [6, 7]


def test_stopped_reader_keeps_nothing(server, urls):
    rows = as_images(urls)
    with rows.fetching() as start:
        start(range(len(urls)))
        assert rows[0].shape == (20, 20, 3)
    assert rows.remote._started == {}


# Properties


def test_pixel_range_is_learned_from_urls_and_remembered(server):
    deep = encoded(Image.fromarray(images(1)[0][:, :, 0].astype(np.uint16) * 257))
    server.objects["/deep.png"] = deep
    url = server.url("deep.png")
    assert learn_pixel_range([url]) == learn_pixel_range([deep])
    n_read = server.count("GET")
    assert learn_pixel_range([url]) == learn_pixel_range([deep])
    assert server.count("GET") == n_read
    assert list(as_images([url]).properties(may_be_transparent)) == [False]


# Processes


def test_images_at_urls_survive_pickle_and_copy(memory):
    rows = as_images(memory)
    rows.fingerprint(0)
    for copied in (pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
        assert copied.fingerprint(0) == rows.fingerprint(0)
        assert (copied[1] == rows[1]).all()


@pytest.mark.slow
def test_workers_read_urls(server, folder):
    X, y = colored_images(12)
    names = [f"train{row}.png" for row in range(len(X))]
    server.objects = {
        f"/{name}": encoded(Image.fromarray(image)) for name, image in zip(names, X, strict=True)
    }
    model = make_pipeline(PretrainedFeatureExtractor(Tiny, cache=None), RidgeClassifier())
    scores = [
        cross_val_score(model, X, y, cv=2, n_jobs=n_jobs, error_score="raise")
        for X, n_jobs in ((list(X), None), ([server.url(name) for name in names], 2))
    ]
    np.testing.assert_array_equal(*scores)
    assert server.count("GET") >= len(X)


# S3


@pytest.fixture(scope="module")
def bucket():
    """Start a server of S3 on this machine; return the URL of a bucket with the images."""
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        filesystem = fsspec.filesystem("s3")
        filesystem.mkdir("images")
        for row, content in enumerate(CONTENTS):
            filesystem.pipe_file(f"images/{row}.png", content)
        yield "s3://images"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def client(version="s3v4"):
    import boto3
    from botocore.config import Config

    config = Config(signature_version=version)
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], config=config)


def test_s3_gives_the_embeddings_of_files(bucket, files, store):
    urls = [f"{bucket}/{row}.png" for row in range(len(CONTENTS))]
    assert (embed(urls) == embed(files)).all()
    assert (embed(urls, cache=store) == embed(files)).all()


def test_changed_object_of_s3_has_another_key_even_if_it_was_listed(bucket):
    filesystem = fsspec.filesystem("s3")
    filesystem.pipe_file("images/changing.png", CONTENTS[0])
    filesystem.ls("images")
    url = f"{bucket}/changing.png"
    before = keys([url])
    assert keys([url]) == before
    client().put_object(Bucket="images", Key="changing.png", Body=CONTENTS[1])
    assert keys([url]) != before


@pytest.mark.parametrize("version", ["s3", "s3v4"])
def test_newly_signed_urls_of_s3_find_the_stored_embeddings(bucket, files, store, version):
    pytest.importorskip("aiohttp")
    first, second = (
        [
            client(version).generate_presigned_url(
                "get_object", {"Bucket": "images", "Key": f"{row}.png"}, ExpiresIn=seconds
            )
            for row in range(len(files))
        ]
        for seconds in (600, 900)
    )
    assert not set(first) & set(second)
    assert (embed(first, cache=store) == embed(files)).all()
    assert (embed(second, cache=store) == embed(files)).all()
    assert (store.info().computed, store.info().read) == (len(files), len(files))


def test_missing_credentials_of_s3_are_errors(bucket, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ImageError, match=r"Access was refused\. Check your credentials"):
        as_images([f"{bucket}/0.png"])[0]
    s3fs.S3FileSystem.clear_instance_cache()


def test_missing_key_and_bucket_of_s3_are_errors(bucket):
    X = [f"{bucket}/0.png", f"{bucket}/none.png", "s3://no-such-bucket/0.png"]
    with pytest.raises(ImageError) as caught:
        embed(X)
    assert [error.row for error in caught.value.errors] == [1, 2]
    assert {error.reason for error in caught.value.errors} == {MISSING}
    with pytest.raises(ImageError, match=MISSING):
        as_images(X).fingerprint(1)
