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

from mmengine.config import Config

import visionattn.openmmlab as openmmlab  # before mmdet and mmseg, whose operators it provides


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 after a message if a file is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="picture file")
    parser.add_argument("--config", required=True, help="the config that it was trained with")
    parser.add_argument("--checkpoint", required=True, help="weights, as mm_train.py writes them")
    parser.add_argument("--out", required=True, metavar="OUT.png", help="where to draw")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a box, default %(default)s")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    arguments = parser.parse_args(argv)
    for file in (arguments.image, arguments.config, arguments.checkpoint):
        if not Path(file).is_file():
            print(f"error: {file}: there is no such file", file=sys.stderr)
            return 1
    config = openmmlab.fit_to_machine(Config.fromfile(arguments.config))
    if config.get("default_scope") == "mmseg":
        from mmseg.apis import inference_model, init_model, show_result_pyplot

        model = init_model(config, arguments.checkpoint, arguments.device)
        result = inference_model(model, arguments.image)
        show_result_pyplot(model, arguments.image, result, show=False, out_file=arguments.out, with_labels=False)
    else:
        import mmcv
        from mmdet.apis import inference_detector, init_detector
        from mmdet.visualization import DetLocalVisualizer

        model = init_detector(config, arguments.checkpoint, device=arguments.device)
        result = inference_detector(model, arguments.image)
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = model.dataset_meta
        picture = mmcv.imread(arguments.image, channel_order="rgb")
        visualizer.add_datasample(
            "seen", picture, result, draw_gt=False, pred_score_thr=arguments.score, out_file=arguments.out
        )
    print(f"drawn on {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
