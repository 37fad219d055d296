"""A process that forks another one for each `sktransfer embed`, with a small network.

It reads requests from standard input, one in a line of JSON: the arguments, and the number of the
event at which the command is killed, or 0. It answers with the exit status, the number of images
that were read and the number of events. A command is killed by SIGKILL, so that nothing is cleaned
up. The events are images that are read, and changes of the file system, before and after each.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path


def serve(main, images, output):
    for line in sys.stdin:
        arguments, kill_at = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            events = Events(kill_at)
            events.count(images.Images, "decode")
            events.count(output.ParquetFile, "append")
            events.count(os, "replace")
            events.count(Path, "unlink")
            events.count(Path, "rmdir")
            status = main(arguments)
            os.write(writer, json.dumps([events.n_images, events.n]).encode())
            os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, *json.loads(answer or "[null, null]")]), flush=True)


class Events:
    """Counts calls of functions, and kills this process at one of them."""

    def __init__(self, kill_at):
        self.kill_at, self.n, self.n_images = kill_at, 0, 0
        self._lock = threading.Lock()

    def count(self, owner, name):
        function = getattr(owner, name)

        def call(*arguments, **options):
            self._happen(name)
            result = function(*arguments, **options)
            if name != "decode":
                self._happen(name)
            return result

        setattr(owner, name, call)

    def _happen(self, name):
        with self._lock:
            self.n += 1
            self.n_images += name == "decode"
            if self.n == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from cli_helpers import tiny_extractor

    import sktransfer.cli.embed
    from sktransfer.cli.main import main
    from sktransfer.data import images
    from sktransfer.embedding import output

    sktransfer.cli.embed.make_extractor = tiny_extractor
    output.BLOCK_SIZE = 4
    serve(main, images, output)
