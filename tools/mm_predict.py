"""Draws what a detector or segmenter sees: boxes and masks, or an overlay of classes.

python tools/mm_predict.py IMAGE --config CONFIG --checkpoint FILE --out OUT.png [--score S] [--device DEVICE]

$ python tools/mm_predict.py street.jpg --config output/nat/mask-rcnn_nat-mini_3x_coco.py \
    --checkpoint output/nat/epoch_36.pth --out seen.png
drawn on seen.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
from mmengine.config import Config

import visionattn.openmmlab as openmmlab  # before mmdet and mmseg, whose operators it provides


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after a message if a file is not there, is no picture, or the checkpoint is of another model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="picture file")
    parser.add_argument("--config", required=True, help="the config that it was trained with")
    parser.add_argument("--checkpoint", required=True, help="weights, as mm_train.py writes them")
    parser.add_argument("--out", required=True, metavar="OUT.png", help="where to draw")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a box, default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    arguments = parser.parse_args(argv)
    try:
        _check_files(arguments)
        _draw(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"drawn on {arguments.out}")
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what can be told before the model is there."""
    for file in (arguments.image, arguments.config, arguments.checkpoint):
        if not Path(file).is_file():
            raise ValueError(f"{file}: there is no such file{', but a folder' if Path(file).is_dir() else ''}")
    if cv2.imread(arguments.image) is None:
        raise ValueError(f"{arguments.image}: not read, since it is no picture or cut off")
    if Path(arguments.out).is_dir() or not cv2.haveImageWriter(arguments.out):
        raise ValueError(f"--out must be a file with an ending such as .png or .jpg, got {arguments.out}")


def _draw(arguments: argparse.Namespace) -> None:
    """Raises ValueError if the checkpoint is not one of the config's model."""
    config = openmmlab.fit_to_machine(Config.fromfile(arguments.config))
    segments = config.get("default_scope") == "mmseg"
    if segments:
        from mmseg.apis import inference_model, show_result_pyplot
        from mmseg.apis import init_model as init
    else:
        from mmdet.apis import inference_detector
        from mmdet.apis import init_detector as init
    checkpoint, _ = openmmlab.read_trained(arguments.checkpoint)
    if segments and "meta" not in checkpoint:
        raise ValueError(f"{arguments.checkpoint}: no checkpoint of mmseg, since it has no meta")
    try:
        model = init(config, arguments.checkpoint, device=arguments.device)
    except ValueError as error:
        raise ValueError(f"{arguments.checkpoint}: {error}") from error
    openmmlab.check_fit(model, arguments.checkpoint)
    if segments:
        result = inference_model(model, arguments.image)
        show_result_pyplot(model, arguments.image, result, show=False, out_file=arguments.out, with_labels=False)
    else:
        import mmcv
        from mmdet.visualization import DetLocalVisualizer

        result = inference_detector(model, arguments.image)
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = model.dataset_meta
        picture = mmcv.imread(arguments.image, channel_order="rgb")
        visualizer.add_datasample(
            "seen", picture, result, draw_gt=False, pred_score_thr=arguments.score, out_file=arguments.out
        )


if __name__ == "__main__":
    sys.exit(main())
