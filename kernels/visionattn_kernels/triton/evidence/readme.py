"""The places of tables in a README, and which kernels a table describes; free of Triton."""

import re
from hashlib import sha256
from pathlib import Path


def source_hash() -> str:
    """First 12 digits of the SHA-256 of the kernels and launchers, file by file in the order of their names."""
    digest = sha256()
    for path in sorted(Path(__file__).parents[1].glob("*.py")):
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
