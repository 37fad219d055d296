import pytest


@pytest.fixture
def table(store):
    return store.table(b"digest", "a table", width=2)
