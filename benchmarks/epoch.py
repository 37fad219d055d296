"""Measure an epoch of fine-tuning on cached activations, compared with epochs in plain torch.

The last two blocks of EfficientNet-Lite0 (block15, conv_head) and the head are trained on the 345
training photographs of benchmarks/tuning.py at 224 x 224. Seconds are medians over several epochs
without the first one, in fresh processes.

sktransfer       FineTunedImageClassifier(unfreeze=(0, 2)), as recorded in its history
compiled         the same with the trained blocks compiled by torch, in the first epoch
all blocks       plain torch, training all blocks: a full forward and backward pass
last two blocks  plain torch, training only these blocks and the head; the other blocks still run
                 forward in each epoch

Plain torch has its images preprocessed in memory, channels last, with frozen BatchNorm, and uses
its fastest batch size. The run fails unless sktransfer is 5 times as fast as "all blocks".

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
KINDS = ("all blocks", "last two blocks")
MIN_SPEEDUP, LOSS_TOLERANCE = 5, 0.01


class Compiling(Callback):
    """Compile the trained blocks at the start of a stage."""

    def on_train_begin(self, net: NeuralNet, **kwargs: Any) -> None:
        """Compile the module."""
        torch._inductor.config.fallback_random = True  # same dropout as without compiling
        net.module_.compile()


def cached(epochs: int, callbacks: Sequence[Callback] = ()) -> dict:
    """Measure the seconds of each epoch on cached activations, and the final training loss."""
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
    """Measure the seconds of each epoch in plain torch."""
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
    net = net.to(memory_format=torch.channels_last).eval().requires_grad_(kind == "all blocks")
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
    parser.add_argument(
        "--epochs", type=int, default=4, help="epochs of each variant; default: %(default)s"
    )
    variants = ("sktransfer", "compiled", *KINDS)
    parser.add_argument("--measure", choices=variants, help="measure a variant in this process")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="of plain torch, with --measure; default: 8"
    )
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error(
            f"Got --epochs {options.epochs}, expected at least 2: the first epoch is not counted"
        )
    if options.measure in ("sktransfer", "compiled"):
        callbacks = [Compiling()] if options.measure == "compiled" else []
        print(json.dumps(cached(options.epochs, callbacks)))
        return
    if options.measure:
        print(json.dumps({"seconds": plain(options.measure, options.batch_size, options.epochs)}))
        return

    def measure(kind: str, batch_size: int = 8) -> dict:
        arguments = ["--measure", kind, "--batch-size", str(batch_size)]
        arguments += ["--epochs", str(options.epochs)]
        figures = in_fresh_process("epoch.py", *arguments, threads=options.threads)
        return {**figures, "median": round(statistics.median(figures["seconds"][1:]), 3)}

    default, compiled = measure("sktransfer"), measure("compiled")
    if not np.isclose(default["loss"], compiled["loss"], rtol=LOSS_TOLERANCE):
        sys.exit(
            f"The compiled blocks learn differently: got loss {compiled['loss']}, "
            f"expected {default['loss']}"
        )
    result: dict = {"sktransfer": default["median"], "compiled": compiled["median"]}
    result["compile_seconds"] = round(compiled["seconds"][0] - compiled["median"], 1)
    print(
        f"sktransfer: {result['sktransfer']:.2f} s per epoch; compiled: "
        f"{result['compiled']:.2f} s, after {result['compile_seconds']} s of compiling"
    )
    for kind in KINDS:
        by_batch = {size: measure(kind, size)["median"] for size in BATCH_SIZES}
        times = round(min(by_batch.values()) / result["sktransfer"], 2)
        result[kind] = {"seconds_by_batch_size": by_batch, "times_sktransfer": times}
        print(f"{kind}: {by_batch}; the fastest takes {times} times as long as sktransfer")
    failures = []
    if result["all blocks"]["times_sktransfer"] < MIN_SPEEDUP:
        failures.append(f"sktransfer is not {MIN_SPEEDUP} times as fast as a full epoch")
    finish(result, failures, options.json)


if __name__ == "__main__":
    main()
