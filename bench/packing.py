"""Pack results into few files of bounded size, for a machine that gives back no more, and unpack them.

    python -m bench.packing FOLDER TO       unpack them

At most eight files below 16 MiB: the report and the tuned file as they are, the rest in up to five archives.
"""

import argparse
import gzip
import io
import shutil
import tarfile
from pathlib import Path

MOST_BYTES = 15 * 2**20
ARCHIVES = 5
PLAIN = ("report.html", "report.md", "tuned-*.json")
NAME = "results-{}.tar.gz"
LEFT_OUT = "left-out.txt"


def pack(folder: Path, out: Path) -> None:
    """Pack all of a folder; files that find no room are named in left-out.txt, inside the first archive."""
    out.mkdir(parents=True, exist_ok=True)
    plain = [file for pattern in PLAIN for file in folder.glob(pattern) if file.stat().st_size < MOST_BYTES]
    for file in plain[:3]:
        replace(out / file.name, file.read_bytes())
    groups: list[list[Path]] = [[]]
    sizes, left_out = [0], []
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".part"]
    for file in files:
        size = len(gzip.compress(file.read_bytes(), 1)) + 1024  # and its header
        place = next((n for n, used in enumerate(sizes) if used + size <= MOST_BYTES), len(sizes))
        if size > MOST_BYTES or place == ARCHIVES:
            left_out.append(f"{file.relative_to(folder)}: {file.stat().st_size} bytes")
            continue
        if place == len(sizes):
            groups.append([])
            sizes.append(0)
        groups[place].append(file)
        sizes[place] += size
    for number, group in enumerate(groups, 1):
        replace(out / NAME.format(number), archive(folder, group, left_out if number == 1 else []))
    for number in range(len(groups) + 1, ARCHIVES + 1):
        (out / NAME.format(number)).unlink(missing_ok=True)


def archive(folder: Path, files: list[Path], left_out: list[str]) -> bytes:
    """A tar of some of a folder's files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file in files:
            tar.add(file, str(file.relative_to(folder)))
        if left_out:
            content = "\n".join(left_out).encode()
            info = tarfile.TarInfo(LEFT_OUT)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def replace(file: Path, content: bytes) -> None:
    """All or nothing, whenever it is interrupted."""
    draft = file.with_suffix(".part")
    draft.write_bytes(content)
    draft.replace(file)


def unpack(out: Path, folder: Path) -> bool:
    """Unpack what `pack` left; False if there is nothing."""
    archives = sorted(out.glob(NAME.format("*")))
    folder.mkdir(parents=True, exist_ok=True)
    for file in archives:
        with tarfile.open(file) as tar:
            for member in tar.getmembers():
                target = folder / member.name
                content = tar.extractfile(member)
                if content is None or ".." in Path(member.name).parts or Path(member.name).is_absolute():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as whole:
                    shutil.copyfileobj(content, whole)
    return bool(archives)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="with packed results")
    parser.add_argument("to", type=Path, help="folder for the unpacked ones")
    args = parser.parse_args()
    if not unpack(args.folder, args.to):
        parser.error(f"folder: expected one with {NAME.format('*')}; got {args.folder}")


if __name__ == "__main__":
    main()
