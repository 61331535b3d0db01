"""Print what every Triton kernel takes of every chip, found by compiling it; no GPU needed.

    python tools/compile_kernels.py
    python tools/compile_kernels.py --traffic
    python tools/compile_kernels.py --operator neighborhood_attention --write kernels/README.md

The first prints, for every entry of every table of tiles, vector registers a thread (r), KiB of shared memory (K),
matrix instructions in the code, and spills; exit status 1 where a kernel spills vector registers, needs more shared
memory than the chip has, or multiplies 16-bit numbers without matrix instructions:

    | neighborhood_attention_fwd bfloat16 32 | 104 r, 12 K, 32 HMMA | 94 r, 20 K, 6 HGMMA | ...

The second counts in Triton's interpreter what the kernels load, store and multiply. With `--write` the tables replace
those in the file; an operator's tables hold until a file that its launcher imports changes.
"""

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, compile or count, print; exit status 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traffic", action="store_true", help="count instead of compiling")
    parser.add_argument("--operator", action="append", help="only this one; may be given again")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables in this file")
    parser.add_argument("--workers", type=int, help="processes that compile, by default one a processor")
    arguments = parser.parse_args(argv)
    if arguments.traffic:
        # Triton reads it when kernels are decorated, so before the import below.
        os.environ["TRITON_INTERPRET"] = "1"
    from visionattn_kernels.triton.evidence import OPERATORS, readme, report

    operators = arguments.operator or OPERATORS
    for name in operators:
        if name not in OPERATORS:
            parser.error(f"--operator must be one of {', '.join(OPERATORS)}, got {name}")
    wrong = []
    for name in operators:
        if arguments.traffic:
            lines, found = [report.traffic_table(name)], []
            print(lines[0])
        else:
            lines, found = _resources(name, arguments.workers)
        lines += ["", report.stamp(name)]
        print(lines[-1])
        if arguments.write and not found:
            place = f"{'traffic' if arguments.traffic else 'resources'} {name}"
            text = readme.replace_table(arguments.write.read_text(), place, "\n".join(lines))
            arguments.write.write_text(text)
        wrong += found
    for fault in wrong:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0


def _resources(operator: str, workers: int | None) -> tuple[list[str], list[str]]:
    """Print the table of an operator line by line; its lines, and what is wrong."""
    from visionattn_kernels.triton.evidence import report

    lines, wrong = [report.resource_header()], []
    print(lines[0])
    for entry, resources, found in report.resource_rows(operator, workers):
        lines.append(report.table_line(str(entry), *map(str, resources.values())))
        print(lines[-1], flush=True)
        wrong += [f"{entry} on {fault}" for fault in found]
    return lines, wrong


if __name__ == "__main__":
    sys.exit(main())
