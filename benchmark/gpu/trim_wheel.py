"""Writes a wheel again without the files whose path holds one of the given words; RECORD forgets them too, as pip wants it.

python trim_wheel.py IN.whl OUT.whl WORD...
"""

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path


def trim(source: Path, target: Path, words: Sequence[str]) -> None:
    """Copies `source` to `target`, leaving out what `words` name."""

    def unwanted(path: str) -> bool:
        return any(word in path for word in words)

    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as rest:
        for entry in whole.infolist():
            if unwanted(entry.filename):
                continue
            data = whole.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if not unwanted(line.partition(",")[0])).encode()
            rest.writestr(entry, data, zipfile.ZIP_DEFLATED, compresslevel=9)


if __name__ == "__main__":
    trim(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
