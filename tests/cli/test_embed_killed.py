"""`sktransfer embed` that is killed anywhere goes on, and hosts compute the same rows."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import Tiny, images, save_images

import sktransfer
from sktransfer import PretrainedFeatureExtractor

TESTS = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
]
KILLED = -9


class Host:
    """A process with its own home, temporary and current folder, which runs commands."""

    def __init__(self, folder):
        environment = dict(os.environ)
        for name in ("HOME", "TMPDIR", "TORCH_HOME", "XDG_CACHE_HOME"):
            (folder / name).mkdir(parents=True)
            environment[name] = str(folder / name)
        packages = [str(Path(sktransfer.__file__).parent.parent), str(TESTS)]
        environment["PYTHONPATH"] = os.pathsep.join(packages)
        self._messages = open(folder / "stderr", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(TESTS / "embed_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env=environment,
            cwd=folder,
        )

    def run(self, *arguments, kill_at=0):
        """Run `sktransfer embed`; return its status, and the numbers of images and events."""
        request = json.dumps([["embed", *map(str, arguments)], kill_at])
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.messages()
        return json.loads(answer)

    def messages(self):
        self._messages.seek(0)
        return self._messages.read()

    def close(self):
        with self._messages:
            self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    host = Host(tmp_path_factory.mktemp("host"))
    yield host
    host.close()


@pytest.fixture
def photos(tmp_path):
    """Save 42 images, of which two are broken; return their sorted paths."""
    paths = sorted(save_images(images(42), tmp_path / "photos"))
    for path in (paths[5], paths[30]):
        Path(path).write_bytes(b"no image")
    return paths


def check(table, paths):
    """Check that a table has all rows, once and in order, with the embeddings of `transform`."""
    assert table["path"].tolist() == list(paths)
    expected = PretrainedFeatureExtractor(Tiny, cache=None, on_error="nan").fit_transform(paths)
    readable = ~np.isnan(expected).any(axis=1)
    assert table["error"].isna().tolist() == readable.tolist()
    np.testing.assert_array_equal(np.stack(table["embedding"][readable]), expected[readable])


def test_shards_killed_at_random_events_lose_and_double_no_row(host, photos, tmp_path):
    random_numbers = random.Random(0)
    outputs, n_kills = [tmp_path / f"{shard}.parquet" for shard in range(3)], 0
    for shard, output in enumerate(outputs):
        arguments = (Path(photos[0]).parent, "-o", output, "--shard", f"{shard}/3", "--resume")
        status = KILLED
        while status == KILLED:
            # A block of four images is finished in some of the runs.
            status, *_ = host.run(*arguments, kill_at=random_numbers.randint(1, 20))
            n_kills += status == KILLED
            assert n_kills < 300
            assert status == KILLED or output.exists()
        assert status == 0, host.messages()
    assert n_kills >= 20
    whole = tmp_path / "whole.parquet"
    assert host.run(Path(photos[0]).parent, "-o", whole)[:2] == [0, 42]
    union = pd.concat(map(pd.read_parquet, outputs), ignore_index=True)
    pd.testing.assert_frame_equal(union, pd.read_parquet(whole))
    check(union, photos)
    assert not list(tmp_path.glob("*.parts")) + list(tmp_path.glob("*.tmp"))


def test_command_killed_at_any_event_goes_on(host, photos, tmp_path):
    """Events are before and after each image, part, the joining and the cleaning up."""
    arguments = (Path(photos[0]).parent, "--shard", "1/4", "-o")
    status, n_images, n_events = host.run(*arguments, tmp_path / "whole.parquet")
    assert (status, n_images) == (0, 11)
    assert n_events > 30
    check(pd.read_parquet(tmp_path / "whole.parquet"), photos[10:21])
    whole = (tmp_path / "whole.parquet").read_bytes()
    n_finished = set()
    for kill_at in range(1, n_events + 1):
        output = tmp_path / f"{kill_at}.parquet"
        assert host.run(*arguments, output, kill_at=kill_at)[0] == KILLED
        n_done = 11 if output.exists() else min(11, 4 * len(list(output_parts(output))))
        n_finished.add(n_done)
        # At most the images of one block are embedded twice.
        assert host.run(*arguments, output, "--resume")[:2] == [0, 11 - n_done], host.messages()
        assert output.read_bytes() == whole
        assert sorted(tmp_path.glob(f"{kill_at}.*")) == [output]
        assert host.run(*arguments, output, "--resume")[:2] == [0, 0]  # it is complete
        assert output.read_bytes() == whole
    assert n_finished == {0, 4, 8, 11}


def output_parts(output):
    return Path(f"{output}.parts").glob("*.parquet")


def test_hosts_compute_the_same_rows(host, photos, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(os.path.relpath(path, tmp_path) for path in photos))
    other = Host(tmp_path / "other")
    outputs = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    for shard, each in enumerate((host, other)):
        assert each.run(listed, "-o", outputs[shard], "--shard", f"{shard}/2")[0] == 0
    again = tmp_path / "again.parquet"
    assert host.run(listed, "-o", again, "--shard", "1/2")[0] == 0
    assert again.read_bytes() == outputs[1].read_bytes()
    union = pd.concat(map(pd.read_parquet, outputs), ignore_index=True)
    union["path"] = [str(tmp_path / path) for path in union["path"]]
    check(union, photos)
    other.close()
