"""Other processes for the tests of the store; they start fast, as they leave torch out."""

import subprocess
import sys
from pathlib import Path

import sktransfer

# The store needs nothing of what `import sktransfer` brings; a function, so that a worker can
# receive it too.
PREAMBLE = f"""
def light():
    import sys, types
    package = types.ModuleType("sktransfer")
    package.__path__ = [{str(Path(sktransfer.__file__).parent)!r}]
    sys.modules.setdefault("sktransfer", package)

light()
"""


def start(script, *arguments, **options):
    """Start Python on a script, with its standard input and output in our hands."""
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process):
    """Wait for a process, and give what it has printed."""
    with process:
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    return output
