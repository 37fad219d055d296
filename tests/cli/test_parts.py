"""Parts are joined with the memory of one; how commands use them is in test_embed."""

import contextlib
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sktransfer.cli.parts import EmbeddingParts
from sktransfer.embedding.output import embedding_table
from sktransfer.utils import files


def test_memory_of_joining_is_that_of_a_part(tmp_path):
    """The file has 31 MB, a part 0.5 MB."""
    blocks = [range(start, start + 64) for start in range(0, 64 * 60, 64)]
    output = tmp_path / "x.parquet"
    parts = EmbeddingParts(output, {"path": None}, blocks, {"rows": [0, 64 * 60]})
    random_state = np.random.RandomState(0)
    with parts.locked():
        assert parts.begin(resume=False, overwrite=False) == 0
        for block, rows in enumerate(blocks):
            embeddings = random_state.rand(64, 2048).astype(np.float32)
            columns = {"path": [f"{row}.png" for row in rows]}
            table = embedding_table(parts.schema, columns, embeddings, [None] * 64)
            parts.write(block, table)
        pool, old = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            assert parts.join() == (0, [])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(old)
    assert peak + pool.max_memory() < 5e6
    metadata = pq.read_metadata(output)
    assert (metadata.num_rows, metadata.num_row_groups) == (64 * 60, 60)
    assert output.stat().st_size > 30e6


def make_parts(folder):
    return EmbeddingParts(folder / "x.parquet", {"path": None}, [range(1)], {"rows": [0, 1]})


@pytest.mark.parametrize("follows", [True, False])
def test_lock_that_its_owner_removed_keeps_others_away(tmp_path, monkeypatch, follows):
    """The owner ends after another process has opened the lock; a third process may follow."""
    locked_file, stack, n_calls = files.locked_file, contextlib.ExitStack(), 0

    @contextlib.contextmanager
    def lock_of_another_process(path):
        nonlocal n_calls
        n_calls += 1
        with locked_file(path):
            if n_calls == 1:
                path.unlink()
                if follows:
                    stack.enter_context(locked_file(path))
            yield

    monkeypatch.setattr(files, "locked_file", lock_of_another_process)
    with stack:
        if follows:
            with (
                pytest.raises(RuntimeError, match="another process"),
                make_parts(tmp_path).locked(),
            ):
                pass
        else:
            with make_parts(tmp_path).locked(), pytest.raises(BlockingIOError):
                stack.enter_context(locked_file(tmp_path / "x.parquet.parts" / "lock"))
        assert n_calls == 2


def test_lock_is_removed_before_it_is_released(tmp_path, monkeypatch):
    locked_file, at_release = files.locked_file, []

    @contextlib.contextmanager
    def watched(path):
        with locked_file(path):
            yield
            at_release.append(path.exists())

    monkeypatch.setattr(files, "locked_file", watched)
    with make_parts(tmp_path).locked():
        assert (tmp_path / "x.parquet.parts" / "lock").exists()
    assert at_release == [False]
    assert not list(tmp_path.iterdir())
