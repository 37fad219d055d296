"""Write docs/benchmarks.md and its plots from the figures in benchmarks/results/.

python benchmarks/page.py
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import matplotlib.pyplot as plt
from _common import ROOT
from matplotlib.axes import Axes

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
OURS, OTHERS, LIMITS = "#1f6feb", "#9aa4b2", "#d9dee5"

OTHERS_IN_FLOAT32 = ["embetter", "fastai", "loop", "tuned"]
OTHERS_IN_HALF = ["fastai_half", "tuned_half"]

WHO = {
    "ours": "sktransfer",
    "torch": "sktransfer, without OpenVINO",
    "half": "sktransfer in bfloat16",
    "loop": "a plain loop in torch",
    "tuned": "a loop in torch, tuned by hand",
    "tuned_half": "the tuned loop in bfloat16",
    "embetter": "embetter",
    "fastai": "fastai",
    "fastai_half": "fastai in bfloat16",
    "forward": "OpenVINO's forward alone, float32",
    "limit": "limit of the cores in float32",
    "arithmetic": "limit of the cores at the speed of a matrix product",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)


def bars(axes: Axes, figures: dict[str, float], unit: str) -> None:
    """Draw one bar for each, the fastest on top, with its figure at its end."""
    names = sorted(figures, key=figures.__getitem__)
    colors = [
        OURS if "sktransfer" in name else LIMITS if name in list(WHO.values())[-3:] else OTHERS
        for name in names
    ]
    drawn = axes.barh(names, [figures[name] for name in names], color=colors)
    axes.bar_label(drawn, fmt="%.0f", padding=4)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)


def save(figure: plt.Figure, name: str) -> str:
    figure.savefig(DOCS / "images" / f"{name}.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return f"images/{name}.png"


def embedding_section() -> str:
    machines = [load(path.stem) for path in sorted(RESULTS.glob("embedding*.json"))]
    figure, axes = plt.subplots(figsize=(7.5, 3.4))
    speeds = {WHO[name]: v["median"] for name, v in present(machines[0]).items()}
    bars(axes, speeds, "images per second")
    path = save(figure, "benchmark_embedding")
    missing = [
        f"{name} {v['missing']}." for name, v in machines[0]["variants"].items() if "missing" in v
    ]
    tables = "\n".join(embedding_table(found) for found in machines)
    return f"""## Embedding

432 photographs (PNG), from file to embedding, with EfficientNet-Lite0 at 224 x 224. Figures are
medians of three rounds in fresh processes (`benchmarks/embedding.py`). The ratios compare each row
with the fastest variant of the same precision that does not use sktransfer, the loop tuned by hand
included. The limit is the speed at which the cores can decode, prepare and run OpenVINO and do
nothing else; the limit of a matrix product assumes that the network multiplies as fast as one large
matrix product in torch. fastai runs channels last in batches of 8; embetter runs in evaluation mode
and without gradients, which is not its default. bfloat16 is requested with `precision="bfloat16"`,
or with torch's autocast in the other variants; the cosine of these rows is the median.

![Images per second on {machines[0]["machine"]["cpu"]}]({path})

{tables}
{" ".join(missing)}
"""


def present(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Select the variants that could be measured, the fastest first."""
    measured = [(name, v) for name, v in found["variants"].items() if "missing" not in v]
    return dict(sorted(measured, key=lambda each: -each[1]["median"]))


def embedding_table(found: dict[str, Any]) -> str:
    """Show the figures of one machine, with ratios to the fastest variant that is not ours."""
    variants = present(found)
    rows = [
        [
            WHO[name],
            v["median"],
            times_fastest(name, variants),
            v["of_the_limit"],
            v.get("cosine", ""),
        ]
        for name, v in variants.items()
    ]
    head = ["", "images per second", "times the fastest other", "share of the limit"]
    return f"""On {found["machine"]["cpu"]}:

{table([*head, "cosine with torch"], rows)}
"""


def times_fastest(name: str, variants: dict[str, Any]) -> float:
    """Compute the median ratio, over the rounds, to the fastest variant without sktransfer.

    A variant in bfloat16 is compared with those in either precision.
    """
    others = OTHERS_IN_FLOAT32 + (OTHERS_IN_HALF if "half" in name else [])
    speeds = [variants[each]["images_per_second"] for each in others if each in variants]
    fastest = [max(rates) for rates in zip(*speeds, strict=True)]
    ratios = [a / b for a, b in zip(variants[name]["images_per_second"], fastest, strict=True)]
    return round(statistics.median(ratios), 2)


def networks_section() -> str:
    found = load("networks")
    rows = [
        [name, v["ours"]["images_per_second"], v["ours"]["best"],
         v["torch"]["images_per_second"],
         f"{v['eager']['images_per_second']} ({v['eager']['best']})",
         f"{v['openvino']['images_per_second']} ({v['openvino']['best']})", v["share"]]
        for name, v in found["networks"].items()
    ]  # fmt: skip
    head = [
        "",
        "sktransfer",
        "engine",
        "without OpenVINO",
        "eager torch",
        "OpenVINO itself",
        "share of the faster",
    ]
    return f"""## Other networks

128 images of 224 x 224 in memory, random weights, images per second (`benchmarks/networks.py`).
sktransfer goes from uint8 pixels to embeddings; the two others run only the forward pass, on
prepared tensors, at their fastest batch size. Medians of three rounds, on
{found["machine"]["cpu"]}.

{table(head, rows)}
"""


def large_jpegs_section() -> str:
    found = load("large_jpegs")
    return f"""## Large JPEGs

JPEGs of 12 megapixels are decoded at a half, a quarter or an eighth of their size, because the
network needs no more pixels. {found["ours"]["read"]} images per second are read, compared with
{found["full"]["read"]} if all pixels are decoded ({found["times_read"]} times), and
{found["ours"]["embedded"]} are embedded, compared with {found["full"]["embedded"]}. The minimum
cosine similarity of both embeddings is {found["cosine"]} (`benchmarks/large_jpegs.py`).
"""


def search_section() -> str:
    found, start = load("search"), load("import_time")
    who = {
        "ours": "`GridSearchCV(Pipeline([extractor, ...]))`",
        "parts": "embedding once, then the search on the embeddings",
        "memory": "the same pipeline without the store, with `Pipeline(memory=)`",
        "plain": "the same pipeline without the store",
    }
    rows = [[who[name], found[name]["seconds"]] for name in who]
    return f"""## Grid search and import

Six candidates, five folds, 432 photographs (`benchmarks/search.py`):

{table(["", "seconds"], rows)}

The search takes {found["times_parts"]} times as long as its parts. `import sktransfer` takes
{start["ratio"]} times as long as `import torch, torchvision, sklearn`
(`benchmarks/import_time.py`).
"""


def growth_section() -> str:
    growth = load("growth")
    sizes = growth["sizes"]
    keys = ("embedding_ms", "reading_ms", "search_beyond_s", "peak_mb", "bytes_kept")
    rows = [
        [f"{int(count):,}", *(figures[key] for key in keys)] for count, figures in sizes.items()
    ]
    figure, axes = plt.subplots(figsize=(7.5, 2.8))
    counts = [int(count) for count in sizes]
    for key, label in (("embedding_ms", "embed"), ("reading_ms", "read again")):
        axes.loglog(counts, [v[key] for v in sizes.values()], "o-", label=label)
    axes.set(xlabel="images", ylabel="ms per image")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = save(figure, "benchmark_growth")
    head = ["images", "embed, ms each", "read again, ms each", "search without its fits, s",
            "peak memory, MB", "stored bytes each"]  # fmt: skip
    return f"""## Cost as work grows

Digits at 32 x 32, so that the time of the network does not dominate (`benchmarks/growth.py`). Peak
memory excludes the embeddings and the file of the store. Stored bytes include the store's journal,
which has 64 MB at most. On {growth["machine"]["cpu"]}.

![Milliseconds per image]({path})

{table(head, rows)}
"""


def tuning_section() -> str:
    found, whole = load("tuning")["variants"], load("accuracy_photographs")
    who = {
        "ours": "`FineTunedImageClassifier()`, whole images at 288 x 288",
        "crop": "the same with `image_size=None`, 224 x 224",
        "probe": "a linear classifier on frozen embeddings",
        "loop": "a plain torch loop: head, then the last blocks",
        "large": "the same loop, whole images at 288 x 288",
        "fastai": "fastai `fine_tune(5, freeze_epochs=3)`, its fastest settings",
        "plain": "fastai `fine_tune(5, freeze_epochs=3)`",
    }
    keys = ("fit_seconds", "again", "times_ours", "times_again", "accuracy")
    measured, varies = (load("tuning_fold0").get(key, "") for key in ("variants", "remark"))
    rows = [
        [
            who[name],
            *(figures.get(key, "") for key in keys),
            found.get(name, {}).get("accuracy", ""),
        ]
        for name, figures in measured.items()
        if "missing" not in figures
    ]
    head = [
        "",
        "seconds of fit",
        "in later processes",
        "times sktransfer",
        "times its later processes",
        "accuracy",
    ]
    digits, epoch = load("accuracy_digits"), load("epoch")
    folds = ", ".join(f"{accuracy:.3f}" for accuracy in found["ours"]["folds"])
    return f"""## Fine-tuning

432 photographs in five folds, EfficientNet-Lite0 (`benchmarks/tuning.py`). Seconds and accuracy of
fold 0 come from one run on an idle machine; the last column is the mean accuracy of five folds. One
image is 0.012 of the accuracy of a fold, and folds vary: sktransfer has {folds}.
{load("tuning").get("remark", "")}

{table([*head, "of five folds"], rows)}

{varies}

Over {len(whole["tuned"]["folds"])} folds sktransfer has {whole["tuned"]["accuracy"]} and the linear
classifier {whole["probe"]["accuracy"]} (`benchmarks/accuracy.py`). The standard error of the
difference of {whole["difference"]:+} is {whole["standard_error"]}, or {whole["corrected_error"]}
if corrected for folds that share images.

1,000 scans of digits to train on, 797 to test, the last 12 blocks trained for 30 epochs:
{digits["tuned"]["accuracy"]} in {digits["tuned"]["fit_seconds"]:.0f} s; a linear classifier on
frozen embeddings {digits["probe"]["accuracy"]}, on raw pixels {digits["pixels"]["accuracy"]}
(`benchmarks/accuracy.py`).

An epoch of the last two blocks on cached activations takes {epoch["ours"]} s, one of plain torch
{epoch["last two"]["times_ours"]} times as long with the other blocks frozen, and
{epoch["everything"]["times_ours"]} times with all trained (`benchmarks/epoch.py`). What is trained
is not compiled: torch compiles it in {epoch["compiling"]} s, after which an epoch takes
{epoch["compiled"]} s.
"""


def leaks_section() -> str:
    found = load("leaks")
    rows = [
        [way, *(round(found[name]["ways"][way][key], 3) for name in ("test", "chosen")
                for key in ("recall", "precision"))]
        for way in found["test"]["ways"]
    ]  # fmt: skip
    head = ["planted copies", "recall", "precision", "recall, 432 others", "precision, 432 others"]
    return f"""## Duplicates that find_leaks finds

Each of {found["test"]["images"]} photographs and drawings beside a copy of it
(`benchmarks/leaks.py`). The thresholds were chosen on the 432 other images, but one of them was
lowered after a first run on these. Two families of drawings are not counted, because that run
showed that the data set contains them more than once.

{table(head, rows)}
"""


def strategies_section() -> str:
    found = load("strategies")
    names = ["frozen", "staged", "full", "scratch"]
    rows = [
        [row["set"], "chooses" if row["chooses"] else "tests", row["size"],
         *(f"{row['accuracy'][name]:.3f}" for name in [*names, "frozen, standardized"]),
         f"{row['error']:.3f}", f"{row['mean_interclass_cosine']:.2f}", " or ".join(row["choices"]),
         "yes" if row["good"] else f"no, {row['chosen']:.3f}"]
        for row in found["rows"]
    ]  # fmt: skip
    head = [
        "set",
        "",
        "of a class",
        *names,
        "standardized",
        "error",
        "mean_interclass_cosine",
        "chosen",
        "good",
    ]
    test, own = found["test"], found["development"]
    always = ", ".join(f"{name} {test['always'][name]}" for name in names)
    path = strategies_plot(found["rows"], names)
    return f"""## What recommend_strategy chooses

Accuracy on held-back images, after training on a few of each class (`benchmarks/strategies.py`).
The last two blocks train for 6 epochs and all blocks for 10, which is few for small sets and for
random weights. A choice is good if it is within one standard error of the best.

On the sets that tested the thresholds it was good in {test["good"]} of {test["cases"]} cases, and
{test["lost"]} below the best on average. Always choosing the same strategy would have been good in:
{always}. On the sets that the thresholds were chosen on it was good in {own["good"]} of
{own["cases"]}. The mean inter-class cosine of the test sets was known before the threshold was set;
the accuracies were not.

*standardized* is a linear classifier on embeddings that are scaled by their standard deviation, not
to length 1; it is not among the choices. Seconds are not reported, because the machine was busy.

![Accuracy against images of a class]({path})

{table(head, rows)}
"""


def strategies_plot(rows: list[dict[str, Any]], names: list[str]) -> str:
    """Draw a panel for each set: accuracy of each strategy, and a ring around the choice."""
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, panels = plt.subplots(2, 6, figsize=(16, 5.6), sharey=True, layout="constrained")
    for axes in panels.flat[len(sets) :]:
        axes.set_axis_off()
    for axes, name in zip(panels.flat, sets, strict=False):
        own = [row for row in rows if row["set"] == name]
        sizes = [row["size"] for row in own]
        for each, color in zip(names, (OTHERS, "#2da44e", OURS, "#d4a017"), strict=True):
            scores = [row["accuracy"][each] for row in own]
            errors = [row["error"] for row in own]
            axes.errorbar(sizes, scores, errors, color=color, marker=".", label=each, capsize=2)
        chosen = [row["chosen"] for row in own]
        axes.plot(sizes, chosen, "o", color="black", mfc="none", ms=11, ls="", label="chosen")
        axes.set(title=f"{name} ({'chooses' if own[0]['chooses'] else 'tests'})", xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("training images of a class")
    figure.supylabel("accuracy on held-back images")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return save(figure, "benchmark_strategies")


def ranking_section() -> str:
    found = load("ranking")
    rows = [
        [name, *(f"{v[key][each]:.2f}" for key in ("probe", "logme")
                 for each in ("tau", "tau of pretrained", "lost"))]
        for name, v in [*found["sets"].items(), ("mean", found)]
    ]  # fmt: skip
    head = ["set", "probe", "pretrained only", "lost", "LogME", "pretrained only", "lost"]
    return f"""## The two orders of rank_backbones

Kendall's rank correlation of an order with that of the accuracy on held-back images, and how much
accuracy its first candidate lost against the best one (`benchmarks/ranking.py`). The candidates are
EfficientNet-Lite0 at two sizes, after blocks 5 and 10, and with adapted BatchNorm; and, as
easy cases, this network and ResNet-18 with random weights. Only one network is pretrained, so the
table shows how both orders rank layers and settings of one network, not how they rank networks.

{table(head, rows)}
"""


def domain_section() -> str:
    found, industrial = load("domain_shift"), load("industrial")
    parts = []
    for task, ways in found["tasks"].items():
        rows = [
            [way, f"{v['accuracy']:.3f}", f"{v['spread']:.3f}", f"{v['closed']:.2f}"]
            for way, v in ways.items()
        ]
        parts.append(table([task, "accuracy", "standard deviation", "share of the gap"], rows))
    tables = "\n\n".join(parts)
    conditions = [*industrial["tuned"]["accuracy"]["standard"]]
    rows = [
        [f"{policy}, {'tuned' if stages == 'tuned' else 'the head alone'}",
         *(f"{accuracy[way]:.3f}" for way in conditions)]
        for stages in ("head", "tuned")
        for policy, accuracy in industrial[stages]["accuracy"].items()
    ]  # fmt: skip
    places = [
        (stages, place) for stages in ("tuned", "head") for place in ("spoiled", "all at once")
    ]
    recovered = [
        [
            policy,
            *(
                f"{industrial[stages][f'recovered {place}'][policy]:.2f}"
                for stages, place in places
            ),
        ]
        for policy in industrial["tuned"]["recovered spoiled"]
    ]
    return f"""## Domain shift

Labels in the source, images without labels in the target, accuracy on other images of the
target over {found["seeds"]} seeds (`benchmarks/domain_shift.py`). `bound` is trained with
labels of the target. The gap is the difference between `source` and `bound`.

{tables}

Test photographs that are corrupted, after training with augmented views of either policy,
{len(industrial["folds"])} folds (`benchmarks/industrial.py`). "spoiled" is the mean over the four
single corruptions, "all at once" applies them one after the other. `bound` is trained with views
that have the same corruptions.

{table(["augment", *conditions], rows)}

Share of the accuracy lost by `"standard"` that each policy recovers:

{table(["augment", *(f"{'two blocks' if s == 'tuned' else s}, {p}" for s, p in places)], recovered)}
"""


def int8_section() -> str:
    found = load("int8")
    rows = [
        [name, v["images_per_second"], v["photographs"], v["digits"], v["median_cosine"]]
        for name, v in found["precisions"].items()
    ]
    head = ["", "images per second", "photographs", "digits", "median cosine with float32"]
    return f"""## Why there is no int8

The forward alone in OpenVINO, quantized after training with NNCF on 300 images of both sets,
and the accuracy of a linear classifier on the embeddings (`benchmarks/int8.py`). It would be
worth a parameter if it were 1.5 times as fast and cost less than half a point on both sets.

{table(head, rows)}
"""


HEAD = """# Benchmarks

Measured on 2 cores of an AMD EPYC or an Intel Xeon, with torch {torch}. Compare within a section:
two sections may come from different machines. Every variant runs in a fresh process, results are
compared before a speed is reported, and other packages run with the fastest settings found for
them. Figures are in `benchmarks/results/`; `benchmarks/page.py` writes this page, and
`benchmarks/run_all.py` repeats the measurements, except int8, the second machine and the rounds on
fold 0.

"""


def main() -> None:
    sections = [embedding_section(), large_jpegs_section(), search_section(), growth_section()]
    sections += [tuning_section(), leaks_section(), strategies_section(), ranking_section()]
    sections += [domain_section()]
    if (RESULTS / "networks.json").exists():
        sections.insert(1, networks_section())
    if (RESULTS / "int8.json").exists():
        sections.append(int8_section())
    results = [load(path.stem) for path in RESULTS.glob("*.json")]
    torch = " or ".join(sorted({each["machine"]["torch"] for each in results if "machine" in each}))
    (DOCS / "benchmarks.md").write_text(HEAD.format(torch=torch) + "\n".join(sections))


if __name__ == "__main__":
    main()
