"""Parts are joined with the memory of one; how commands use them is in test_embed."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sktransfer.cli.parts import EmbeddingParts
from sktransfer.embedding.output import embedding_table


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
