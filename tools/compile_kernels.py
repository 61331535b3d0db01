"""Print what every Triton kernel takes of every chip, found by compiling it; no GPU needed.

    python tools/compile_kernels.py
    python tools/compile_kernels.py --traffic
    python tools/compile_kernels.py --write kernels/README.md

The first prints, for every entry of every table of tiles, vector registers a thread (r), KiB of shared memory (K),
matrix instructions in the code, and spills; exit status 1 where a kernel spills vector registers, needs more shared
memory than the chip has, or multiplies 16-bit numbers without matrix instructions:

    | neighborhood_attention_fwd bfloat16 32 | 104 r, 12 K, 32 HMMA | 94 r, 20 K, 6 HGMMA | ...

The second counts in Triton's interpreter what the kernels load, store and multiply. With `--write` the table replaces
that in the file.
"""

import argparse
import os
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parse `argv`, compile or count, print; exit status 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traffic", action="store_true", help="count instead of compiling")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table in this file")
    parser.add_argument("--workers", type=int, help="processes that compile, by default one a processor")
    arguments = parser.parse_args(argv)
    if arguments.traffic:
        # Triton reads it when kernels are decorated, so before the import below.
        os.environ["TRITON_INTERPRET"] = "1"
    from visionattn_kernels.triton.evidence import readme, report

    if arguments.traffic:
        name, lines, wrong = "traffic", [report.traffic_table()], []
        print(lines[0])
    else:
        name, lines, wrong = "resources", [report.resource_header()], []
        print(lines[0])
        for entry, resources, found in report.resource_rows(arguments.workers):
            lines.append(report.table_line(str(entry), *map(str, resources.values())))
            print(lines[-1], flush=True)
            wrong += [f"{entry} on {fault}" for fault in found]
    print(report.stamp())
    for fault in wrong:
        print(fault, file=sys.stderr)
    if arguments.write and not wrong:
        text = arguments.write.read_text()
        arguments.write.write_text(readme.replace_table(text, name, "\n".join([*lines, "", report.stamp()])))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
