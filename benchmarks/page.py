"""Write docs/benchmarks.md, its plots, and the tables of docs/scaling.md from benchmarks/results/.

Run it after the benchmarks have written their JSON files; benchmarks/run_all.py does both.

    python benchmarks/page.py
"""

from __future__ import annotations

import json
import statistics
import textwrap
from typing import Any

import _scaling_page
import matplotlib.pyplot as plt
from _common import ROOT

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
BLUE, GRAY, LIGHT_GRAY, GREEN, YELLOW = "#1f6feb", "#9aa4b2", "#d9dee5", "#2da44e", "#d4a017"

UNBROKEN = {"break_long_words": False, "break_on_hyphens": False}

FLOAT32_OTHERS = ["embetter", "fastai", "loop", "tuned_loop"]
BFLOAT16_OTHERS = ["fastai_bfloat16", "tuned_loop_bfloat16"]
LIMITS = ["forward", "limit", "matmul_limit"]

EMBEDDING_LABELS = {
    "sktransfer": "sktransfer",
    "sktransfer_torch": "sktransfer, without OpenVINO",
    "sktransfer_bfloat16": "sktransfer in bfloat16",
    "loop": "a plain loop in torch",
    "tuned_loop": "a loop in torch, tuned by hand",
    "tuned_loop_bfloat16": "the tuned loop in bfloat16",
    "embetter": "embetter",
    "fastai": "fastai",
    "fastai_bfloat16": "fastai in bfloat16",
    "forward": "OpenVINO's forward pass only, float32",
    "limit": "limit in float32",
    "matmul_limit": "limit at the speed of a matrix product",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def wrap(text: str) -> str:
    """Wrap the paragraphs of a page; tables, lists, headings and images stay as they are."""
    blocks = [
        block if block.startswith(("|", "-", "#", "!")) else textwrap.fill(block, 100, **UNBROKEN)
        for block in text.split("\n\n")
    ]
    return "\n\n".join(blocks)


def save(figure: plt.Figure, name: str) -> str:
    figure.savefig(DOCS / "images" / f"{name}.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return f"images/{name}.png"


def embedding_section() -> str:
    machines = [load(path.stem) for path in sorted(RESULTS.glob("embedding*.json"))]
    variants = machines[0]["variants"]
    path = embedding_plot(machines[0])
    missing = [f"{name} {v['missing']}." for name, v in variants.items() if "missing" in v]
    tables = "\n".join(embedding_table(figures) for figures in machines)
    return f"""## Embedding

The task is to embed 432 photographs (PNG), from file to embedding, with EfficientNet-Lite0 at
224 x 224 (`benchmarks/embedding.py`). Figures are medians of three rounds in fresh processes.

- "Relative to the fastest other" is the ratio to the fastest variant without sktransfer, including
  the loop tuned by hand. Rows in float32 are compared only with variants in float32.
- "Relative to the limit" is the ratio to the limit in float32: the speed if the cores did nothing
  but decode and preprocess images and run OpenVINO. The limit at the speed of a matrix product
  assumes that the network multiplies as fast as one large matrix product in torch.
- "Cosine with torch" compares the embeddings with those of plain torch in float32. It is the
  minimum over the images, or the median for embetter, fastai and all rows in bfloat16.

fastai runs channels last in batches of 8. embetter runs in evaluation mode and without gradients,
which is not its default. For bfloat16, sktransfer uses `precision="bfloat16"` and the other
variants use torch's autocast.

![Images per second on {machines[0]["machine"]["cpu"]}]({path})

{tables}
{" ".join(missing)}
"""


def embedding_plot(figures: dict[str, Any]) -> str:
    """Draw a horizontal bar for each variant, with the fastest at the top."""
    speeds = {name: row["median"] for name, row in reversed(present(figures).items())}
    colors = [
        BLUE if name.startswith("sktransfer") else LIGHT_GRAY if name in LIMITS else GRAY
        for name in speeds
    ]
    figure, axes = plt.subplots(figsize=(7.5, 3.4))
    labels = [EMBEDDING_LABELS[name] for name in speeds]
    bars = axes.barh(labels, list(speeds.values()), color=colors)
    axes.bar_label(bars, fmt="%.0f", padding=4)
    axes.set_xlabel("images per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    return save(figure, "benchmark_embedding")


def present(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Select the variants that were measured, with the fastest first."""
    measured = [(name, v) for name, v in figures["variants"].items() if "missing" not in v]
    return dict(sorted(measured, key=lambda item: -item[1]["median"]))


def embedding_table(figures: dict[str, Any]) -> str:
    """Format the figures of one machine."""
    variants = present(figures)
    rows = [
        [
            EMBEDDING_LABELS[name],
            v["median"],
            times_fastest(name, variants),
            v["share_of_limit"],
            v.get("cosine", ""),
        ]
        for name, v in variants.items()
    ]
    head = ["", "images per second", "relative to the fastest other", "relative to the limit"]
    return f"""On {figures["machine"]["cpu"]}:

{table([*head, "cosine with torch"], rows)}
"""


def times_fastest(name: str, variants: dict[str, Any]) -> float:
    """Compute the median ratio, over the rounds, to the fastest variant without sktransfer.

    A variant in bfloat16 is compared with those in either precision.
    """
    others = FLOAT32_OTHERS + (BFLOAT16_OTHERS if "bfloat16" in name else [])
    speeds = [variants[other]["images_per_second"] for other in others if other in variants]
    fastest = [max(rates) for rates in zip(*speeds, strict=True)]
    ratios = [a / b for a, b in zip(variants[name]["images_per_second"], fastest, strict=True)]
    return round(statistics.median(ratios), 2)


def networks_section() -> str:
    figures = load("networks")
    rows = [
        [name, v["sktransfer"]["images_per_second"], v["sktransfer"]["best"],
         v["sktransfer_torch"]["images_per_second"],
         f"{v['eager']['images_per_second']} ({v['eager']['best']})",
         f"{v['openvino']['images_per_second']} ({v['openvino']['best']})", v["share"]]
        for name, v in figures["networks"].items()
    ]  # fmt: skip
    head = [
        "network",
        "sktransfer",
        "its engine",
        "sktransfer, without OpenVINO",
        "eager torch, forward pass only",
        "OpenVINO, forward pass only",
        "sktransfer relative to the faster of these two",
    ]
    return f"""## Other networks

Images per second, for 128 images of 224 x 224 in memory and random weights
(`benchmarks/networks.py`). sktransfer goes from uint8 pixels to embeddings. The last two variants
run only the forward pass on preprocessed tensors, at their fastest batch size. Figures are medians
of three rounds on {figures["machine"]["cpu"]}.

{table(head, rows)}
"""


def large_jpegs_section() -> str:
    figures = load("large_jpegs")
    reduced, full = figures["sktransfer"], figures["all_pixels"]
    return f"""## Large JPEGs

The network does not need all pixels of a JPEG of 12 megapixels, so sktransfer decodes it at a half,
a quarter or an eighth of its size. It reads {reduced["read"]} images per second, compared with
{full["read"]} if all pixels are decoded ({figures["times_read"]} times as fast), and embeds
{reduced["embedded"]} images per second, compared with {full["embedded"]}. The minimum cosine
similarity between the two sets of embeddings is {figures["cosine"]}
(`benchmarks/large_jpegs.py`).
"""


def search_section() -> str:
    figures, imports = load("search"), load("import_time")
    labels = {
        "sktransfer": "`GridSearchCV(Pipeline([extractor, ...]))`",
        "parts": "embedding once, then the search on the embeddings",
        "memory": "the same pipeline without the store, with `Pipeline(memory=)`",
        "plain": "the same pipeline without the store",
    }
    rows = [[labels[name], figures[name]["seconds"]] for name in labels]
    return f"""## Grid search and import

A search with six candidates and five folds on 432 photographs (`benchmarks/search.py`):

{table(["", "seconds"], rows)}

The search takes {figures["times_parts"]} times as long as embedding once and searching on the
embeddings. Importing the two estimators takes {imports["ratio"]} times as long as
`import torch, torchvision, skorch, sklearn.linear_model`, and `import sktransfer` alone
{imports["sktransfer"]:.2f} s (`benchmarks/import_time.py`).
"""


def growth_section() -> str:
    growth = load("growth")
    sizes = growth["sizes"]
    keys = ("embedding_ms", "reading_ms", "search_overhead_s", "peak_mb", "bytes_per_image")
    rows = [
        [f"{int(count):,}", *(figures[key] for key in keys)] for count, figures in sizes.items()
    ]
    figure, axes = plt.subplots(figsize=(7.5, 2.8))
    counts = [int(count) for count in sizes]
    for key, label in (("embedding_ms", "embed"), ("reading_ms", "read from the store")):
        axes.loglog(counts, [v[key] for v in sizes.values()], "o-", label=label)
    axes.set(xlabel="images", ylabel="ms per image")
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    ticks = (0.02, 0.1, 0.5, 2)
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = save(figure, "benchmark_growth")
    head = ["images", "embedding, ms per image", "reading again, ms per image",
            "search overhead, s", "peak memory, MB", "stored bytes per image"]  # fmt: skip
    return f"""## Scaling with the number of images

The images are digits at 32 x 32, so that the network does not dominate the time
(`benchmarks/growth.py`). Search overhead is the time of a grid search with the extractor minus that
of the same search on embeddings in memory. Peak memory excludes the embeddings and the file of the
store. Stored bytes include the journal of the store, which takes up to 64 MB. Measured on
{growth["machine"]["cpu"]}.

![Milliseconds per image]({path})

{table(head, rows)}
"""


def tuning_section() -> str:
    five_folds = load("tuning")
    labels = {
        "sktransfer": "`FineTunedImageClassifier()`, whole images at 288 x 288",
        "crop": "the same with `image_size=None`, 224 x 224",
        "probe": "a linear classifier on frozen embeddings",
        "loop": "a plain torch loop: head, then the last blocks",
        "loop_288": "a plain torch loop, whole images at 288 x 288",
        "fastai": "fastai `fine_tune(5, freeze_epochs=3)`, its fastest settings",
        "fastai_default": "fastai `fine_tune(5, freeze_epochs=3)`",
    }
    keys = ("fit_seconds", "later_fit_seconds", "times_sktransfer", "times_later", "accuracy")
    variants, remark = (load("tuning_fold0").get(key, "") for key in ("variants", "remark"))
    rows = [
        [
            labels[name],
            *(figures.get(key, "") for key in keys),
            five_folds["variants"].get(name, {}).get("accuracy", ""),
        ]
        for name, figures in variants.items()
        if "missing" not in figures
    ]
    head = [
        "",
        "fit, s",
        "fit in later processes, s",
        "relative to sktransfer",
        "relative to sktransfer in later processes",
        "accuracy on fold 0",
        "mean accuracy of five folds",
    ]
    epoch = load("epoch")
    accuracies = [f"{accuracy:.3f}" for accuracy in five_folds["variants"]["sktransfer"]["folds"]]
    folds = ", ".join(accuracies[:-1]) + " and " + accuracies[-1]
    return f"""## Fine-tuning

All variants use EfficientNet-Lite0 and 432 photographs in five folds (`benchmarks/tuning.py`).
Seconds and the accuracy on fold 0 come from one run on an idle machine. The last column is the mean
accuracy over five folds. One image changes the accuracy of a fold by 0.012, and folds vary:
sktransfer scored {folds}. {five_folds.get("remark", "")}

{table(head, rows)}

{remark}

An epoch of the last two blocks on cached activations takes {epoch["sktransfer"]} s. An epoch in
plain torch takes {epoch["last two blocks"]["times_sktransfer"]} times as long with the other blocks
frozen, and {epoch["all blocks"]["times_sktransfer"]} times as long with all blocks trained
(`benchmarks/epoch.py`). sktransfer does not compile the trained blocks: compiling takes torch
{epoch["compile_seconds"]} s, and an epoch then takes {epoch["compiled"]} s.
"""


def accuracy_section() -> str:
    figures = load("accuracy")
    names = {"default": "`FineTunedImageClassifier()`", "probe": "linear classifier"}
    names |= {"loop": "torch loop", "fastai": "fastai", "pixels": "linear classifier on pixels"}
    rows = [
        [
            f"{row['name']}{' *' if row['development'] else ''}",
            row["size"] or "",
            row["tested"],
            row["standard_error"],
            *(
                f"{row[name]['accuracy']:.3f}, {row[name]['log_loss']:.2f}, "
                f"{row[name]['calibration_error']:.2f}"
                if name in row
                else ""
                for name in names
            ),
        ]
        for row in figures["rows"]
    ]
    head = ["", "images per class", "test images", "standard error", *names.values()]
    photographs, loop, test = (figures[key] for key in ("photographs", "versus_loop", "test"))
    low, high = loop["interval_95"]
    return f"""## Accuracy of the defaults

Accuracy, log loss and expected calibration error, each a mean over several draws of the training
images (`benchmarks/accuracy.py`). All variants get the same images at the same input size: 288 x
288 for the photographs, 64 x 64 to 96 x 96 for the others. The standard error is that of the best
accuracy. Defaults were chosen on the data sets with a star, some of which share photographs; the
others were only used for testing. {figures.get("remark", "")}

{table(head, rows)}

On the data sets that were only used for testing, `FineTunedImageClassifier()` was the best or
within one standard error of the best in {test["good"]} of {test["cases"]} cases. Over all data
sets it was at most {test["most_below_probe_in_errors"]} standard errors below the linear
classifier.

On the photographs, `FineTunedImageClassifier()` scored {photographs["default"]["accuracy"]} and a
linear classifier on frozen embeddings {photographs["probe"]["accuracy"]} over
{photographs["default"]["fits"]} folds. On the {loop["folds"]} folds on which a plain torch loop was
trained too, the difference from it is {loop["difference"]:+}, with a paired 95 % interval of
{low:+} to {high:+}.
"""


def leaks_section() -> str:
    figures = load("leaks")
    rows = [
        [kind, *(round(figures[name]["copies"][kind][key], 3) for name in ("test", "development")
                 for key in ("recall", "precision"))]
        for kind in figures["test"]["copies"]
    ]  # fmt: skip
    head = ["kind of copy", "recall", "precision", "recall, 432 others", "precision, 432 others"]
    return f"""## Duplicates found by find_leaks

A copy of each image was added to {figures["test"]["images"]} photographs and drawings
(`benchmarks/leaks.py`). The thresholds were chosen on the 432 other images, but one threshold was
lowered after a first run on the {figures["test"]["images"]}. Pairs within two families of drawings
are not counted, because that run showed that the data set contains these drawings more than once.

{table(head, rows)}
"""


# The remark of sections whose figures were not measured again.
_EARLIER = (
    "Measured with earlier defaults of `FineTunedImageClassifier`: two tuned blocks, three views "
    "of each image, and no average of the weights."
)


def strategies_section() -> str:
    figures = load("strategies")
    names = ["frozen", "staged", "full", "scratch"]
    rows = [
        [row["set"], "choosing" if row["development"] else "testing", row["size"],
         *(f"{row['accuracy'][name]:.3f}" for name in [*names, "frozen, standardized"]),
         f"{row['standard_error']:.3f}", f"{row['mean_interclass_cosine']:.2f}",
         " or ".join(row["choices"]), "yes" if row["good"] else f"no, {row['chosen']:.3f}"]
        for row in figures["rows"]
    ]  # fmt: skip
    head = [
        "data set",
        "used for",
        "images per class",
        *names,
        "standardized",
        "standard error",
        "mean inter-class cosine",
        "choice",
        "good",
    ]
    test, development = figures["test"], figures["development"]
    always = [f"{test['always'][name]} (`{name}`)" for name in names]
    path = strategies_plot(figures["rows"], names)
    return f"""## Choices of recommend_strategy

{_EARLIER}

Accuracy on held-out images, after training on a few images per class (`benchmarks/strategies.py`).
The last two blocks are trained for 6 epochs and all blocks for 10, which is few for small data sets
and for random weights. A choice is good if its accuracy is within one standard error of the best.

On the data sets used for testing the thresholds, the choice was good in {test["good"]} of
{test["cases"]} cases, and on average {test["lost"]} less accurate than the best strategy. Always
using the same strategy would have been good in {", ".join(always[:-1])} and {always[-1]} cases. On
the data sets used for choosing the thresholds, the choice was good in {development["good"]} of
{development["cases"]} cases. The mean inter-class cosine of the test sets was known before the
threshold was set; their accuracies were not.

*standardized* is a linear classifier on embeddings scaled by their standard deviation instead of to
length 1; it is not one of the strategies. Seconds are omitted because the machine was not idle.

![Accuracy against images per class]({path})

{table(head, rows)}
"""


def strategies_plot(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Draw a panel for each data set, with the accuracy of each strategy and of the choice."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, panels = plt.subplots(2, 6, figsize=(16, 5.6), sharey=True, layout="constrained")
    for axes in panels.flat[len(sets) :]:
        axes.set_axis_off()
    for axes, set_name in zip(panels.flat, sets, strict=False):
        cases = [row for row in rows if row["set"] == set_name]
        sizes = [row["size"] for row in cases]
        for name, color in zip(names, (GRAY, GREEN, BLUE, YELLOW), strict=True):
            scores = [row["accuracy"][name] for row in cases]
            errors = [row["standard_error"] for row in cases]
            axes.errorbar(sizes, scores, errors, color=color, marker=".", label=name, capsize=2)
        chosen = [row["chosen"] for row in cases]
        axes.plot(sizes, chosen, "o", color="black", mfc="none", ms=11, ls="", label="choice")
        used_for = "choosing" if cases[0]["development"] else "testing"
        axes.set(title=f"{set_name} ({used_for})", xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("training images per class")
    figure.supylabel("accuracy on held-out images")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return save(figure, "benchmark_strategies")


def ranking_section() -> str:
    figures = load("ranking")
    rows = [
        [name, *(f"{v[key][figure]:.2f}" for key in ("probe", "logme")
                 for figure in ("tau", "tau_pretrained", "lost"))]
        for name, v in [*figures["sets"].items(), ("mean", figures)]
    ]  # fmt: skip
    head = ["data set", "probe", "probe, pretrained only", "probe, lost accuracy",
            "LogME", "LogME, pretrained only", "LogME, lost accuracy"]  # fmt: skip
    return f"""## Rankings of rank_backbones

Candidates are ordered by the cross-validated accuracy of a linear probe, and by LogME
(`benchmarks/ranking.py`). The table shows Kendall's rank correlation of each order with the
accuracy on held-out images, and how much less accurate the first candidate is than the best one.
The candidates are EfficientNet-Lite0 at two sizes, after blocks 5 and 10, and with adapted
BatchNorm. EfficientNet-Lite0 and ResNet-18 with random weights are added as easy cases. Only one
network is pretrained, so the table shows how well both orders rank layers and settings of one
network, not different networks. The probe standardized the embeddings, while `rank_backbones`
scales them to unit length.

{table(head, rows)}
"""


def domain_section() -> str:
    figures = load("domain_shift")
    parts = []
    for task, methods in figures["tasks"].items():
        rows = [
            [method, f"{v['accuracy']:.3f}", f"{v['std']:.3f}", f"{v['gap_closed']:.2f}"]
            for method, v in methods.items()
        ]
        parts.append(table([task, "accuracy", "standard deviation", "share of the gap"], rows))
    tables = "\n\n".join(parts)
    return f"""## Domain shift

{_EARLIER}

The source domain has labels; the target domain does not. The tables show the accuracy on other
images of the target, over {figures["seeds"]} seeds (`benchmarks/domain_shift.py`):

- `source`: fine-tuned on the source only
- `adapt`: with `batch_norm="adapt"`
- `CORAL`: CORAL on the embeddings of the tuned network
- `DANN`: with `domain_adversarial=0.3`
- `self-training`: `SelfTrainedImageClassifier`
- `target labels`: fine-tuned on the target with its labels

The gap is the difference in accuracy between `source` and `target labels`.

{tables}
"""


def corruptions_section() -> str:
    figures = load("industrial")
    conditions = [*figures["tuned"]["accuracy"]["standard"]]
    labels = {"head": "head only", "tuned": "two blocks"}
    rows = [
        [f"{policy}, {labels[stages]}", *(f"{accuracy[name]:.3f}" for name in conditions)]
        for stages in ("head", "tuned")
        for policy, accuracy in figures[stages]["accuracy"].items()
    ]
    columns = [
        (stages, name) for stages in ("tuned", "head") for name in ("one corruption", "all four")
    ]
    recovered = [
        [
            policy,
            *(f"{figures[stages][f'recovered, {name}'][policy]:.2f}" for stages, name in columns),
        ]
        for policy in figures["tuned"]["recovered, one corruption"]
    ]
    return f"""## Corrupted images

{_EARLIER}

Accuracy on corrupted test photographs, after training with the augmented views of each policy,
over {len(figures["folds"])} folds (`benchmarks/industrial.py`). "one corruption" is the mean over
the four single corruptions; "all four" applies them one after the other. `standard` makes three
views per image and `industrial` seven, unless the row says otherwise. `test corruptions` is trained
on images with the corruptions of the test.

{table(["augment", *conditions], rows)}

Share of the accuracy lost by `"standard"` that each policy recovers:

{table(["augment", *(f"{labels[stages]}, {name}" for stages, name in columns)], recovered)}
"""


def int8_section() -> str:
    figures = load("int8")
    rows = [
        [name, v["images_per_second"], v["photographs"], v["digits"], v["median_cosine"]]
        for name, v in figures["precisions"].items()
    ]
    head = ["", "images per second", "accuracy on photographs", "accuracy on digits",
            "median cosine with float32"]  # fmt: skip
    full, quantized = figures["precisions"]["float32"], figures["precisions"]["int8"]
    lost = {name: 100 * (full[name] - quantized[name]) for name in ("photographs", "digits")}
    return f"""## int8 quantization

The table shows OpenVINO's forward pass only, quantized after training with NNCF on 300 images of
both data sets, and the accuracy of a linear classifier on the embeddings (`benchmarks/int8.py`).
sktransfer does not support int8, because it costs {lost["photographs"]:.1f} points of accuracy on
photographs and {lost["digits"]:.1f} on digits.

{table(head, rows)}
"""


def export_section() -> str:
    figures = load("export")
    versions, sharp = figures["node"]["versions"], figures["node"]["sharp"]
    runs = ["node", "web", "node_with_sharp"]
    graphs = {name: v for name, v in figures.items() if name.endswith(("float32", "float16"))}
    rows = [
        [
            name.replace("_", " "),
            v["megabytes"],
            v["max_difference"],
            *(v[run]["max_difference"] for run in runs),
        ]
        for name, v in graphs.items()
    ]
    (n_images,) = {v["images"] for v in graphs.values()}
    same = {v[run]["same_class"] for v in graphs.values() for run in runs}
    head = ["model, type of the weights", "MB", "Python", "Node.js", "WebAssembly",
            "Node.js, pixels of sharp"]  # fmt: skip
    opaque, other = sharp["opaque"], sharp["translucent"]
    return f"""## Exported models

The table shows the largest difference between a probability of the exported model and of
`predict_proba`, on the {n_images} photographs, in ONNX Runtime in Python and in JavaScript
(`benchmarks/export.py --node`; onnxruntime-node and onnxruntime-web {versions["onnxruntime"]} in
Node.js {versions["node"]}). The most probable class was the same on {min(same)} of the {n_images}
photographs in the worst run. All runs but the last one read the same pixels.

{table(head, rows)}

sharp {versions["sharp"]} decoded {opaque["pixels_that_differ"]:,} of the {opaque["pixels"]:,}
opaque pixels differently from `predict`. Of the {other["pixels"]:,} pixels that are not opaque,
which are composited on white, {other["pixels_that_differ"]:,} differed, by at most
{other["largest_difference"]} of 255 levels. That explains the last column.
"""


def serving_section() -> str:
    figures = load("serving")
    models = {
        "classifier": "`FineTunedImageClassifier`, 288 x 288",
        "pipeline": "linear classifier on embeddings, 224 x 224",
    }
    rows = []
    for key, name in models.items():
        v = figures[key]
        rows.append(
            [
                name,
                f"{v['latency']['request_p50_ms']:.1f} ({v['latency']['request_p95_ms']:.1f})",
                f"{v['latency']['forward_p50_ms']:.1f} ({v['latency']['forward_p95_ms']:.1f})",
                *(f"{1000 * v[run]['first_seconds']:.0f}" for run in ("first", "first_warm")),
                f"{v['latency']['requests_per_second']:.0f}",
                *(f"{v['memory'][key]:.0f}" for key in ("warm_mb", "end_mb")),
            ]
        )
    last = f"after {figures['requests']:,}"
    head = ["model", "request, ms", "plain forward, ms", "first request, ms", "after `warm_up`, ms",
            "requests/s, 16 threads", "MB after 1,000", last]  # fmt: skip
    return f"""## Serving

`benchmarks/serving.py` loads a saved model and predicts one image at a time, as a server does.
Times are medians, with the 95th percentile in parentheses. The plain forward is the same resize and
the same network in torch (eager, inference mode, channels last), without the linear classifier.

{table(head, rows)}
"""


OUT_OF_CORE_LABELS = {
    "memory": "`LogisticRegression` on an array in memory",
    "mapped": "`LogisticRegression` on a memory map",
    "sample": "`LogisticRegression` on {} rows",
    "pca": "`IncrementalPCA(256)`, then `LogisticRegression` in memory",
    "blocks": "`MLPClassifier(())` from blocks",
    "parquet": "`MLPClassifier(())` from blocks of a Parquet file",
    "sgd": "`SGDClassifier` from blocks",
    "sgd_averaged": "`SGDClassifier` from blocks, constant rate, averaged",
}


def out_of_core_section() -> str:
    sets = load("out_of_core")["sets"]
    tables = {}
    for name, figures in sets.items():
        rows = [
            [out_of_core_label(variant), v["seconds"], f"{v['peak_mb']:,}", f"{v['accuracy']:.4f}",
             f"{v['log_loss']:.3f}"]
            for variant, v in figures["variants"].items()
        ]  # fmt: skip
        epochs = f"{figures['epochs']} epoch{'s' if figures['epochs'] > 1 else ''}"
        head = [f"{figures['rows']:,} rows x {figures['features']:,}, {epochs}", "seconds", "MB",
                "accuracy", "log loss"]  # fmt: skip
        tables[name] = table(head, rows)
    arrays = [f"{figures['array_mb']:,}" for figures in sets.values()]
    return f"""## Embeddings that do not fit in memory

Linear classifiers on embeddings in a file, each learned in a fresh process
(`benchmarks/out_of_core.py`; the code is in [the guide](out_of_core.md)). MB is the
memory that learning adds at its peak, without the pages of mapped files. The arrays of the training
rows alone take {", ".join(arrays[:-1])} and {arrays[-1]} MB. Files are not in the page cache when
the learning begins. Accuracy and log loss are those on 10,000 other rows.

Embeddings of images of clothes at 32 x 32:

{tables["clothes"]}

Synthetic rows, class centers with correlated noise:

{tables["million"]}

{tables["many"]}
"""


def out_of_core_label(variant: str) -> str:
    kind, _, count = variant.partition("_")
    if kind == "sample":
        return OUT_OF_CORE_LABELS[kind].format(f"{int(count):,}")
    return OUT_OF_CORE_LABELS[variant]


HEAD = """# Benchmarks

All figures were measured on 2 cores of an AMD EPYC or an Intel Xeon, with torch {torch}. Compare
figures only within a section, because sections may come from different machines. Each variant runs
in a fresh process, and its results are checked before a speed is reported. Other packages run with
the fastest settings found for them. The figures are in `benchmarks/results/`;
`benchmarks/page.py` writes this page. `benchmarks/run_all.py` repeats all measurements except those
of int8, of the second machine, and of the three rounds on fold 0.

"""


def main() -> None:
    sections = [
        embedding_section(),
        networks_section(),
        large_jpegs_section(),
        search_section(),
        growth_section(),
        tuning_section(),
        accuracy_section(),
        leaks_section(),
        strategies_section(),
        ranking_section(),
        domain_section(),
        corruptions_section(),
        int8_section(),
        export_section(),
        serving_section(),
        out_of_core_section(),
    ]
    results = [load(path.stem) for path in RESULTS.glob("*.json")]
    versions = {result["machine"]["torch"] for result in results if "machine" in result}
    head = HEAD.format(torch=" or ".join(sorted(versions)))
    page = wrap(head + "\n".join(sections)).rstrip("\n") + "\n"
    (DOCS / "benchmarks.md").write_text(page)
    scaling = DOCS / "scaling.md"
    scaling.write_text(_scaling_page.filled(scaling.read_text(), _scaling_page.tables(load)))


if __name__ == "__main__":
    main()
