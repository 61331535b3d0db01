"""Runs for each seeded fault the tests that must notice it, on a copy of the packages that has the fault.

    python tests/mutants                                        # all of them, as a table
    python tests/mutants --write tests/mutants/table.md
    python tests/mutants "delta missing" --write tests/mutants/table.md  # by name, in place of their rows

Exit status 1 if a fault survives.
"""

import argparse
import datetime
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import FAULTS, Fault
from killing import FAILED, judge

HEAD = """# Seeded faults

Written by `python tests/mutants --write tests/mutants/table.md`, at last on {date}. The faults stand in faults.py.

| fault | file | killed by |
|---|---|---|
"""


def row(fault: Fault, killer: str) -> str:
    """The line of the table for a fault that a test kills."""
    return f"| {fault.name} | `{fault.path}` | `{killer}` |"


def write(path: Path, rows: dict[str, str]) -> None:
    """Write the table of all faults in their order; those without a row here keep the one they have."""
    if path.exists():
        rows = {line.split(" | ")[0].removeprefix("| "): line for line in path.read_text().splitlines()} | rows
    lines = [rows[fault.name] for fault in FAULTS if fault.name in rows]
    path.write_text(HEAD.format(date=datetime.date.today()) + "\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Print the table, and write it too if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - {fault.name for fault in FAULTS}:
        parser.error(f"unknown faults {sorted(unknown)}, wanted some of {sorted({fault.name for fault in FAULTS})}")
    faults = [fault for fault in FAULTS if not args.names or fault.name in args.names]
    killed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for fault, (status, output) in zip(faults, pool.map(judge, faults), strict=True):
            if status != FAILED:
                print(f"SURVIVED (status {status}): {fault.name} in {fault.path}: {output}", flush=True)
                continue
            killed += 1
            print(row(fault, output), flush=True)
            if args.write:
                write(args.write, {fault.name: row(fault, output)})
    print(f"{killed} of {len(faults)} faults killed")
    return 0 if killed == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
