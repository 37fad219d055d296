"""An epoch of fine-tuning on cached activations, against epochs of plain torch.

The last two blocks of EfficientNet-Lite0 (block15, conv_head) and the head, on the 345 training
photographs of benchmarks/tuning.py at 224 x 224. Ours is FineTunedImageClassifier(unfreeze=(0, 2)),
as its history tells; "compiled" is the same with what is trained compiled by torch, which its first
epoch pays for. Plain torch has its images ready in memory, channels last, frozen BatchNorm, and
the batch size that turns out fastest; it is measured with gradients

everything  for all blocks: a full forward and backward pass,
last two    for those two blocks and the head: the other blocks still run forward each epoch.

Seconds are medians of several epochs, without the first one, in fresh processes. Fails where ours
is not 5 times as fast as "everything"; the other ratio is for information.

    python benchmarks/epoch.py [--epochs 4] [--threads 2] [--json PATH]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from _common import (
    MEAN,
    STD,
    command_line,
    finish,
    in_fresh_process,
    lite0,
    split,
)
from skorch import NeuralNet
from skorch.callbacks import Callback
from torch import nn
from torchvision.transforms import v2

from sktransfer.data.decoding import decode

BATCH_SIZES = (4, 8, 16, 32)
KINDS = ("everything", "last two")
FASTER, SAME_LOSS = 5, 0.01


class Compiling(Callback):
    """Compiles what is trained when a stage begins."""

    def on_train_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        """See skorch."""
        torch._inductor.config.fallback_random = True  # the same dropout
        net.module_.compile()


def ours(epochs: int, callbacks: Sequence[Callback] = ()) -> dict:
    """Give the seconds of each epoch of the stage that trains the last two blocks, and its end."""
    from sktransfer import FineTunedImageClassifier

    paths, y, _, _ = split()
    classifier = FineTunedImageClassifier(
        unfreeze=(0, 2),
        max_epochs=epochs,
        early_stopping=False,
        image_size=None,
        callbacks=callbacks,
        random_state=0,
    )
    history = [row for row in classifier.fit(paths, y).history_ if "dur" in row]
    return {"seconds": [row["dur"] for row in history], "loss": history[-1]["train_loss"]}


def plain(kind: str, batch_size: int, epochs: int) -> list[float]:
    """Give the seconds of each epoch of plain torch."""
    paths, y, _, _ = split()
    prepare = v2.Compose(
        [
            v2.Resize(256, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    images = torch.stack([prepare(torch.from_numpy(decode(p)).permute(2, 0, 1)) for p in paths])
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(y)
    net = lite0()
    net.fc = nn.Linear(net.fc.in_features, len(labels.unique()))
    net = net.to(memory_format=torch.channels_last).eval().requires_grad_(kind == "everything")
    for module in (net.blocks[-1], net.conv_head, net.bn1, net.fc):
        module.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-4)
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        for rows in torch.randperm(len(labels)).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="of each; default: %(default)s")
    kinds = ("ours", "compiled", *KINDS)
    parser.add_argument("--measure", choices=kinds, help="measure it, in this process")
    parser.add_argument("--batch-size", type=int, default=8, help="with --measure; default: 8")
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error("Got --epochs below 2, but the first one does not count")
    if options.measure in ("ours", "compiled"):
        print(
            json.dumps(ours(options.epochs, [Compiling()] if options.measure == "compiled" else []))
        )
        return
    if options.measure:
        print(json.dumps({"seconds": plain(options.measure, options.batch_size, options.epochs)}))
        return

    def measure(kind: str, batch_size: int = 8) -> dict:
        arguments = ["--measure", kind, "--batch-size", str(batch_size)]
        arguments += ["--epochs", str(options.epochs)]
        found = in_fresh_process("epoch.py", *arguments, threads=options.threads)
        return {**found, "median": round(statistics.median(found["seconds"][1:]), 3)}

    found, compiled = measure("ours"), measure("compiled")
    if not np.isclose(found["loss"], compiled["loss"], rtol=SAME_LOSS):
        sys.exit(f"Compiled, it learns something else: {compiled['loss']}, not {found['loss']}")
    result: dict = {"ours": found["median"], "compiled": compiled["median"]}
    result["compiling"] = round(compiled["seconds"][0] - compiled["median"], 1)
    print(f"ours: {result['ours']:.2f} s an epoch; compiled {result['compiled']:.2f} s", end=", ")
    print(f"after {result['compiling']} s of compiling")
    for kind in KINDS:
        by_batch = {size: measure(kind, size)["median"] for size in BATCH_SIZES}
        times = round(min(by_batch.values()) / result["ours"], 2)
        result[kind] = {"seconds_by_batch_size": by_batch, "times_ours": times}
        print(f"{kind}: {by_batch}, the fastest {times} times ours")
    failures = []
    if result["everything"]["times_ours"] < FASTER:
        failures.append(f"ours is not {FASTER} times as fast as a full epoch")
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
