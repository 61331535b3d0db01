"""README.md of a trained model: what it is, what was measured of it, what made it, and how to load it."""

from typing import TYPE_CHECKING, Any

from visionattn.training.report import score

if TYPE_CHECKING:
    from visionattn.training.run import Run


def model_card(run: "Run", environment: dict[str, Any]) -> str:
    """The card of the best model of `run`, which has trained, as Markdown in the layout of the Hugging Face hub.

    Args:
        run: with its history.
        environment: the last entry of environment.json.
    """
    config, best = run.config, max(run.history, key=score)
    weights = "averaged weights" if "ema_top1" in best else "weights"
    place = f"hf-hub:{config.push_to_hub}" if config.push_to_hub else "local-dir:FOLDER"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    size = "x".join(map(str, run.data_config["input_size"]))
    parameters = sum(parameter.numel() for parameter in run.bare_model.parameters()) / 1e6
    baselines = [f"| {name} on the pixels | {top1:.2f} |" for name, top1 in run.baselines.items()]
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "---",
        f"# {config.model.name} on {config.data.root or config.data.reader}",
        "",
        f"{parameters:.2f} M parameters, pictures of {size}, {len(run.class_names)} classes. Loaded by",
        "",
        "```python",
        "import timm",
        "import visionattn",
        "",
        f'model = timm.create_model("{place}", pretrained=True).eval()',
        "```",
        "",
        f"| measured on {len(run.val)} validation pictures | top-1, % |",
        "|---|---|",
        f"| the {weights} after epoch {best['epoch']} of {run.epochs}, chosen by this figure | {score(best):.2f} |",
        *baselines,
        "",
        f"Trained on {len(run.train)} pictures by `{environment['command']}` (git {environment['git']}), last started "
        f"{environment['time']} on {environment['machine']}, with {versions}. Nothing else was measured.",
    ]
    return "\n".join(lines) + "\n"
