import re
from pathlib import Path

import pytest

import sktransfer
from sktransfer.utils import config

PACKAGE = Path(sktransfer.__file__).parent


def test_only_config_reads_the_variables_of_the_package():
    """Other modules may name variables only in docstrings, in double backquotes."""
    named = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"(?<!``)SKTRANSFER_", path.read_text())
    }
    assert named == {"utils/config.py"}


def test_every_variable_is_in_the_table():
    source = (PACKAGE / "utils" / "config.py").read_text()
    names = {variable.name for variable in config.VARIABLES}
    assert names == set(re.findall(r"\bSKTRANSFER_\w+", source))
    assert all(variable.meaning for variable in config.VARIABLES)


@pytest.mark.parametrize("variable", config.VARIABLES, ids=lambda variable: variable.name)
def test_variable_is_read_at_each_use(variable, monkeypatch):
    monkeypatch.delenv(variable.name, raising=False)
    assert variable.get() == variable.default
    monkeypatch.setenv(variable.name, "one")
    assert variable.get() == "one"
    variable.set("two")
    assert variable.get() == "two"
