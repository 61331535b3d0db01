"""A data set to learn from in minutes: drawn shapes on crops of photographs, for detection and segmentation.

    python tests/mm/shapes.py FOLDER

writes it to FOLDER, which must be new, with configs of a small Mask R-CNN and a small UPerNet that learn from it.
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
from skimage import data

CLASSES = ("square", "disc", "triangle")
COLOURS = ((230, 60, 50), (60, 200, 80), (70, 90, 240))
SIZE = 128


def _outline(kind: int, x: int, y: int, radius: int, turn: float) -> np.ndarray:
    """Corners (N, 2) of a shape about a centre; a disc has 32."""
    corners = (4, 32, 3)[kind]
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], 1).round().astype(np.int32)


def _picture(rng: np.random.Generator, photographs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list]:
    """A picture (128, 128, 3), its classes (128, 128) with 0 for background, and the outlines of two shapes."""
    photograph = photographs[rng.integers(len(photographs))]
    top, left = (rng.integers(side - SIZE + 1) for side in photograph.shape[:2])
    picture = photograph[top : top + SIZE, left : left + SIZE].copy()
    classes, shapes = np.zeros((SIZE, SIZE), np.uint8), []
    # One shape in each half, so that none hides another.
    for half in range(2):
        kind, radius = int(rng.integers(3)), int(rng.integers(16, 28))
        x = int(np.clip(rng.integers(64) + 64 * half, 64 * half + radius, 64 * half + 64 - radius))
        y = int(rng.integers(radius, SIZE - radius))
        outline = _outline(kind, x, y, radius, rng.uniform(0, 2 * np.pi))
        colour = np.clip(np.array(COLOURS[kind]) + rng.integers(-40, 41, 3), 0, 255)
        cv2.fillPoly(picture, [outline], colour.tolist())
        cv2.fillPoly(classes, [outline], kind + 1)
        shapes.append((kind, outline))
    return picture, classes, shapes


def write(root: Path, split: str, count: int, seed: int) -> None:
    """Write `count` pictures to root/split, their classes to root/split_classes, and root/split.json as COCO has it."""
    rng = np.random.default_rng(seed)
    photographs = [data.astronaut(), data.coffee(), data.chelsea()]
    (root / split).mkdir(parents=True)
    (root / f"{split}_classes").mkdir()
    images, annotations = [], []
    for number in range(count):
        picture, classes, shapes = _picture(rng, photographs)
        cv2.imwrite(str(root / split / f"{number}.png"), picture[..., ::-1])
        cv2.imwrite(str(root / f"{split}_classes" / f"{number}.png"), classes)
        images.append({"id": number, "file_name": f"{number}.png", "height": SIZE, "width": SIZE})
        for kind, outline in shapes:
            low, high = outline.min(0).tolist(), outline.max(0).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kind + 1,
                    "bbox": [*low, high[0] - low[0], high[1] - low[1]],
                    "area": float(cv2.contourArea(outline)),
                    "segmentation": [outline.flatten().tolist()],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": kind + 1, "name": name} for kind, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(content))


def write_all(root: Path) -> None:
    """Write 200 pictures to learn from, 24 to be tested on, and the configs for both."""
    write(root, "train", 200, seed=0)
    write(root, "val", 24, seed=1)
    for file in Path(__file__).parent.glob("shapes_*.py"):
        (root / file.name.removeprefix("shapes_")).write_text(file.read_text().replace("DATA", str(root.resolve())))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
