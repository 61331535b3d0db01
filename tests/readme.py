"""The code blocks of README.md, for the test that runs the Python ones and for .ci/run, which runs the shell ones.

python tests/readme.py 1    # prints the first shell block that is meant to be run
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parents[1] / "README.md"


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        language: "bash" or "python".
        reason: Why it is not run, or "".
        code: What stands in it.
    """

    language: str
    reason: str
    code: str


def blocks(text: str | None = None) -> list[Block]:
    """All fenced blocks of README.md, or of `text`, in their order.

    Raises:
        ValueError: A block says neither what language it is nor why it is not run.
    """
    found = []
    text = README.read_text() if text is None else text
    for info, code in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S):
        parts = re.fullmatch(r"(bash|python)(?: not-run: (.+))?", info)
        if parts is None:
            raise ValueError(f"a block must begin with bash or python and may add 'not-run: REASON', got {info!r}")
        found.append(Block(parts[1], parts[2] or "", code))
    return found


def runnable(language: str) -> list[str]:
    """The code of the blocks in `language` that are meant to be run."""
    return [block.code for block in blocks() if block.language == language and not block.reason]


if __name__ == "__main__":
    print(runnable("bash")[int(sys.argv[1]) - 1])
