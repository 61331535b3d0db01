"""What timm reads, in the form that the training takes: pictures by number, their labels and their classes.

A reader has `samples`, (name, label) of each picture, and `class_to_idx`, and gives (picture or open file, label).
"""

import io
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader import Reader
from torchvision.datasets.folder import IMG_EXTENSIONS


def read_folder(root: str | Path, split: str | None = None, required: bool = False) -> Reader:
    """The folder reader of timm on `root`, or on its subfolder for `split` if it has one, for torchvision's endings.

    What a dot hides is left out: `.ipynb_checkpoints`, the `._` files of macOS.

    Args:
        root: folder of class folders, or of the parts that hold them.
        split: name of the part.
        required: whether the subfolder has to be there.

    Raises:
        ValueError: no such folder, no pictures in it, pictures outside class folders, two class folders of one name.
    """
    folder = os.path.normpath(root)
    if not os.path.isdir(folder):
        raise ValueError(f"{root} is not a folder")
    try:
        reader = create_dataset(
            "", root=folder, split=split or "", search_split=split is not None, input_key=";".join(IMG_EXTENSIONS)
        ).reader
    except RuntimeError as error:
        part = "" if split is None else f" for the part {split!r}"
        raise ValueError(f"no pictures{part} in {root}, wanted files in {', '.join(IMG_EXTENSIONS)}") from error
    if required and reader.root == folder:
        raise ValueError(
            f"{root} has no folder for the part {split!r}; wanted one, or data.val_fraction to hold pictures back"
        )
    _leave_out_hidden(reader)
    if "" in reader.class_to_idx:
        hint = "" if reader.root == folder else f" (if that is a class, data.train_split=. reads all of {root})"
        raise ValueError(f"{reader.root} holds pictures itself, wanted them in one folder for each class{hint}")
    places: dict[int, str] = {}
    for path, label in reader.samples:
        place = os.path.dirname(path)
        if (other := places.setdefault(label, place)) != place:
            raise ValueError(f"{other} and {place} are class folders of one name, wanted one for each class")
    return reader


def _leave_out_hidden(reader: Reader) -> None:
    """Drop the pictures with a dotted name, or in a folder of one, and the classes that have no others."""
    hidden, start = f"{os.sep}.", len(reader.root)
    shown = [(path, label) for path, label in reader.samples if hidden not in path[start:]]
    if not shown:
        raise ValueError(f"no pictures in {reader.root} but hidden ones")
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    labels = {old: new for new, old in enumerate(sorted({label for _, label in shown}))}
    reader.samples = [(path, labels[label]) for path, label in shown]
    reader.class_to_idx = {names[old]: new for old, new in labels.items()}


def open_folder(root: str, split: str, required: bool) -> Reader:
    """`read_folder` for a training, where every class folder has to hold pictures.

    Raises:
        ValueError: as `read_folder`, or a class folder without pictures.
    """
    if not os.path.isdir(root):
        raise ValueError(f"data.root {root} is not a folder")
    reader = read_folder(root, split, required)
    with_pictures = {os.path.dirname(path) for path, _ in reader.samples}
    for folder, subfolders, _ in os.walk(reader.root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if not subfolders and folder not in with_pictures:
            raise ValueError(f"the class folder {folder} holds no pictures")
    return reader


class ListedReader(Reader):
    """A data set that yields (picture or open file, label) by number, beside its labels.

    Attributes:
        samples: (number and data set, label) of each picture.
        class_to_idx: name of each class to its label.

    Raises:
        ValueError: no pictures, or a label that no class has.
    """

    def __init__(self, dataset: Any, where: str, labels: list[int], class_names: list[str]) -> None:
        super().__init__()
        self.dataset = dataset
        self.class_to_idx = {str(name): label for label, name in enumerate(class_names)}
        if not labels:
            raise ValueError(f"no pictures in {where}")
        if unknown := set(labels) - set(range(len(class_names))):
            raise ValueError(f"{where} has the label {min(unknown)}, wanted one of its {len(class_names)} classes")
        self.samples = [(f"{number} of {where}", label) for number, label in enumerate(labels)]

    def __getitem__(self, index: int) -> tuple[Image.Image | io.IOBase, int]:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.samples[index][0]


def open_torchvision(name: str, root: str, split: str) -> ListedReader:
    """A data set of torchvision that timm knows and that lies below `root`, such as `torch/cifar10`; no download.

    Raises:
        ValueError: an unknown data set, one that is not below `root`, one without a list of labels.
    """
    try:
        dataset = create_dataset(name, root=root, split=split)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot open {name} in {root}: {error}") from error
    labels, classes = getattr(dataset, "targets", None), getattr(dataset, "classes", None)
    if labels is None or classes is None:
        raise ValueError(f"{name} lists no labels and classes, wanted a data set with `targets` and `classes`")
    return ListedReader(dataset, f"{name} ({split})", [int(label) for label in labels], list(classes))


def open_hugging_face(name: str, root: str | None, split: str) -> ListedReader:
    """A data set of the Hugging Face hub, or of a folder that its library reads: `hfds/ID` or `hfds/PATH`.

    Args:
        name: with its prefix.
        root: where the library keeps what it prepares, by default its own cache.
        split: name of the part.

    Raises:
        ValueError: the package `datasets` is missing, there is no such data set, or its `label` has no class names.
    """
    require("datasets", name)
    try:
        reader = create_dataset(name, root=root, split=split).reader
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot open the part {split!r} of {name}: {error}") from error
    if not reader.class_to_idx:
        raise ValueError(f"the column `label` of {name} has no class names, wanted a ClassLabel")
    labels = list(reader.dataset[reader.label_key])
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    return ListedReader(reader, f"{name} ({split})", labels, names)


def require(package: str, reader: str) -> None:
    """Raises a ValueError that says how to install `package`, if it is missing."""
    if find_spec(package) is None:
        raise ValueError(f"data.reader {reader} needs the package {package}: pip install 'visionattn[readers]'")
