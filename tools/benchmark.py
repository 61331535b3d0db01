"""Time operators beside their baselines, models beside each other, and either on growing maps.

    python tools/benchmark.py op neighborhood_attention
    python tools/benchmark.py model resnet50 nat_mini dinat_mini
    python tools/benchmark.py model swin_small_patch4_window7_224 nat_tiny
    python tools/benchmark.py model --authors CHECKOUTS authors_van_b0 van_b0
    python tools/benchmark.py growth neighborhood_attention linear_attention --sides 32 64 128 256 --plot growth.png
    python tools/benchmark.py growth mala_tiny l2vit_tiny --sides 256 512 1024 --plot memory.png
    python tools/benchmark.py training configs/train/quickstart.yaml time_loop=1536
    python tools/benchmark.py features nat_mini van_b0 --sizes 512x512 800x1333
    python tools/benchmark.py features configs/mmdet/mask-rcnn_nat-mini_3x_coco.py --sizes 800x1333

Calls take turns in one process and medians are printed. Quote the ratios: the times are those of the machine that the
first line names. An operator is timed only after its results and gradients were found to be the baseline's, a model
only after a step gave finite logits and gradients. Growth is that of a forward with backward of a batch of one, and its
plot needs the extra `viz`. Features are those of a detector's backbone, one image and no gradients; without names, of
the smallest model of every family. A config of mmdet in place of a name (extra `mm`) stands for the whole detector. A
training (extra `train`) is timed on whole epochs beside a bare loop over the same batches in memory, and its loader
beside timm's with the transforms of validation; `time_loop` shortens the epoch. Which checkouts `--authors` takes,
authors.py beside this file says.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

# The profiler behind the memory column reports its start and stop unless it is told not to before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from authors import register

import visionattn  # noqa: F401  (registers the models)
from visionattn.benchmark import PYRAMIDS, cost_features, growing_model, time_models
from visionattn_kernels.benchmark import ROUTES, SIZED, Growth, compare_all, grow, growing_operator, keep_memory, slope


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, measure, print; exit status 1 where a check fails or a name is unknown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    op = kinds.add_parser("op", help="an operator beside its baseline; clock as of model")
    op.add_argument("name")
    op.add_argument("--threads", type=int, default=1)
    model = kinds.add_parser("model", help="models beside the first one named; wall time, of one thread process time")
    model.add_argument("names", nargs="+")
    model.add_argument("--batch", type=int, default=4)
    model.add_argument("--size", type=int, default=224)
    model.add_argument("--threads", type=int, default=2)
    growth = kinds.add_parser("growth", help="operators or models on maps of growing sides, process time and memory")
    growth.add_argument("names", nargs="+")
    growth.add_argument("--sides", type=int, nargs="+", default=[32, 64, 128, 256])
    growth.add_argument("--threads", type=int, default=1)
    growth.add_argument("--plot", type=Path, help="file for the picture")
    features = kinds.add_parser("features", help="backbones, or detectors, on an image; clock as of model")
    features.add_argument("names", nargs="*", default=PYRAMIDS)
    features.add_argument("--sizes", nargs="+", type=_size, default=[(512, 512), (800, 1333), (1333, 1333)])
    features.add_argument("--threads", type=int, default=2)
    training = kinds.add_parser("training", help="a configuration beside a bare loop, its loader beside timm's")
    training.add_argument("config", type=Path)
    training.add_argument("overrides", nargs="*", metavar="key=value")
    training.add_argument("--threads", type=int, default=1)
    for kind in (model, growth):
        kind.add_argument("--authors", type=Path, help="folder of the authors' repositories, for names `authors_...`")
    for kind in (op, model, growth, features, training):
        kind.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{date.today()}, {_processor()}, {args.threads} threads, torch {torch.__version__}, float32, CPU")
    try:
        if getattr(args, "authors", None):
            register(args.authors, args.names)
        printers = {"op": _print_operator, "model": _print_models, "growth": _print_growth}
        printers |= {"features": _print_features, "training": _print_training}
        printers[args.kind](args)
    except (AssertionError, RuntimeError, ValueError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


def _size(text: str) -> tuple[int, int]:
    """An image's height and width, as in 800x1333."""
    height, width = text.split("x")
    return int(height), int(width)


def _clock(threads: int) -> Callable[[], float]:
    """Of one thread the process's own time counts, which other work on the machine hardly changes."""
    return time.process_time if threads == 1 else time.perf_counter


def _print_operator(args: argparse.Namespace) -> None:
    print(f"{'case':<58} {'forward':>18} {'forward+backward':>20} {'forward memory':>20}")
    for row in compare_all(args.name, args.rounds, _clock(args.threads)):
        memory = f"{row.memory / 2**20:.1f} MiB, {row.memory / row.baseline_memory:.2f}x"
        forward = f"{row.forward * 1e3:.1f} ms, {row.forward_ratio:.1f}x"
        both = f"{row.both * 1e3:.1f} ms, {row.both_ratio:.1f}x"
        print(f"{row.case!s:<58} {forward:>18} {both:>20} {memory:>20}")
    print("Times: so many times as fast as the baseline. Memory: so many times that of the baseline.")


def _print_models(args: argparse.Namespace) -> None:
    print(f"batch {args.batch}, {args.size} px; ratios to {args.names[0]}, below 1 is faster or smaller")
    print(f"{'model':<36} {'forward':>18} {'training step':>18} {'training memory':>18}")
    for row in time_models(args.names, args.batch, args.size, args.rounds, _clock(args.threads)):
        forward = f"{row.forward * 1e3:.0f} ms, {row.forward_ratio:.2f}"
        step = f"{row.step * 1e3:.0f} ms, {row.step_ratio:.2f}"
        memory = f"{row.memory / 2**20:.0f} MiB, {row.memory_ratio:.2f}"
        print(f"{row.name:<36} {forward:>18} {step:>18} {memory:>18}")


def _print_features(args: argparse.Namespace) -> None:
    keep_memory()
    sizes = "".join(f"{f'{height}x{width}':>20}" for height, width in args.sizes)
    print(f"{'one image, no gradients':<26}{sizes} {'time, memory grow like pixels^':>32}")
    for name in args.names:
        cost = cost_features(name, args.sizes, args.rounds, _clock(args.threads))
        row = [f"{cost.seconds[size]:.2f} s, {(cost.own + cost.memory[size]) / 2**20:.0f} MiB" for size in args.sizes]
        grown = "{:.2f}, {:.2f}".format(*cost.slopes) if len(args.sizes) > 1 else ""
        print(f"{Path(name).stem:<26}{''.join(f'{cell:>20}' for cell in row)} {grown:>32}", flush=True)
    print("Memory: the weights and what is held beside them at most.")


def _print_growth(args: argparse.Namespace) -> None:
    keep_memory()
    growths = []
    for name in args.names:
        make = growing_operator(name) if name in SIZED or name == ROUTES else growing_model(name)
        growths.append(grow(name, make, args.sides, args.rounds))
        seconds, memory = growths[-1].seconds, growths[-1].memory
        print(f"{name}: time grows like pixels^{slope(seconds):.2f}, memory like pixels^{slope(memory):.2f}")
        for side in args.sides:
            print(f"  {side:>5} px {seconds[side] * 1e3:>10.1f} ms {memory[side] / 2**20:>10.1f} MiB")
    if args.plot:
        _plot(growths, args.plot)


def _print_training(args: argparse.Namespace) -> None:
    from visionattn.training.config import load_config
    from visionattn.training.speed import time_training

    config = load_config(args.config, [*args.overrides, f"threads={args.threads}"])
    print(*time_training(config, args.rounds).lines(), sep="\n")


def _plot(growths: list[Growth], path: Path) -> None:
    """Draw time and memory over the pixels, on logarithmic axes, beside a line that is linear in them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, title in zip(figure.subplots(1, 2), ("milliseconds", "MiB"), strict=True):
        for growth in growths:
            costs = growth.seconds if title == "milliseconds" else growth.memory
            unit = 1e-3 if title == "milliseconds" else 2**20
            pixels = [side * side for side in costs]
            label = f"{growth.name} ({slope(costs):.2f})"
            (line,) = axes.loglog(pixels, [cost / unit for cost in costs.values()], "o-", label=label)
            first = next(iter(costs.values())) / unit
            axes.loglog(pixels, [first * n / pixels[0] for n in pixels], ":", color=line.get_color())
        axes.set(xlabel="pixels; dotted: linear growth", ylabel=title)
        axes.legend(title="exponent", loc="upper left", fontsize="small")
    figure.savefig(path)


def _processor() -> str:
    """The processor's name as Linux tells it, or what Python knows."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
