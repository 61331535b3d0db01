"""The places of tables in a README, and which kernels a table describes; free of Triton."""

import re
from hashlib import sha256
from pathlib import Path


def source_files(operator: str) -> set[Path]:
    """The operator's launcher and what it imports, directly or not, of the kernels and launchers."""
    folder, found, names = Path(__file__).parents[1], set(), [operator]
    while names:
        path = folder / f"{names.pop()}.py"
        if path not in found:
            found.add(path)
            names += re.findall(r"^from visionattn_kernels\.triton\.(\w+) import", path.read_text(), flags=re.MULTILINE)
    return found


def source_hash(operator: str) -> str:
    """First 12 digits of the SHA-256 of `source_files`, file by file in the order of their names."""
    digest = sha256()
    for path in sorted(source_files(operator)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def replace_table(text: str, name: str, table: str) -> str:
    """`text` with what stands between the comments `NAME` and `/NAME` replaced.

    Raises:
        ValueError: The comments are not there.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    parts = re.fullmatch(f"(.*{start}).*({end}.*)", text, flags=re.DOTALL)
    if parts is None:
        raise ValueError(f"expected a place for the table, {start} and then {end}, in text of {len(text)} characters")
    return f"{parts[1]}\n{table}\n{parts[2]}"
