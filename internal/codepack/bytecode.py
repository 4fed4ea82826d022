"""Compiles the Python sources below a folder into the bytecode that an import looks for in __pycache__.

Arguments: this program, VERSION (major.minor), SOURCES, OUTPUT, WORKSPACE (where the sources will lie), WORKER, WORKERS. Exit status 3:
this Python is another. What cannot be compiled is left to the start that imports it, if there is one."""

import importlib.util
import marshal
import os
import sys

UNCHECKED = (1).to_bytes(4, "little")  # PEP 552: found by a hash of the source, and used without looking at that
OTHER = 3


def compiled(source, path):
    code = compile(source, path, "exec", dont_inherit=True)
    return importlib.util.MAGIC_NUMBER + UNCHECKED + importlib.util.source_hash(source) + marshal.dumps(code)


def main(version, sources, output, workspace, worker, workers):
    if sys.implementation.name != "cpython" or "%d.%d" % sys.version_info[:2] != version or sys.version_info.releaselevel != "final":
        sys.exit(OTHER)
    names = sorted(os.path.relpath(os.path.join(folder, name), sources) for folder, _, files in os.walk(sources) for name in files)
    for name in names[int(worker)::int(workers)]:
        with open(os.path.join(sources, name), "rb") as file:
            source = file.read()
        try:
            data = compiled(source, os.path.join(workspace, name))
        except Exception:  # of another Python's syntax, too deep, no text: whatever it is
            continue
        target = os.path.join(output, importlib.util.cache_from_source(name))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(data)


main(*sys.argv[1:])
