"""Checks that an object compiled for one instruction set defines nothing that baseline code could end up calling.

The linker keeps one copy of an inline function or template instance (a weak symbol) however many objects define it. A
copy compiled for AVX-512 that wins would make the library crash on an older processor, in code that has nothing to do
with the kernels. So every weak definition must live in a namespace named after the instruction set.
"""

import argparse
import subprocess
import sys

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--nm", default="nm")
parser.add_argument("isa", help="the namespace that the objects' symbols may use")
parser.add_argument("objects", nargs="+")
args = parser.parse_args()

WEAK = {"W", "V", "u"}
total, strays = 0, []
for path in args.objects:
    listing = subprocess.run(
        [args.nm, "--defined-only", "--demangle", path], check=True, capture_output=True, text=True
    ).stdout
    for line in listing.splitlines():
        _, kind, name = line.split(maxsplit=2)
        total += 1
        if kind in WEAK and f"::{args.isa}::" not in name:
            strays.append(f"{path}: {kind} {name}")

if not total:
    sys.exit(f"{args.isa}: the objects define no symbol at all")
if strays:
    sys.exit(f"{args.isa}: weak symbols that baseline code shares:\n" + "\n".join(strays))
print(f"{args.isa}: {total} symbols in {len(args.objects)} objects, none shared with baseline code")
