"""Finds images by the names that annotation files give them, which other computers have written."""

import collections
import functools
import os
import unicodedata
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path


def is_below(path: str | Path, folder: str | Path) -> bool:
    """Whether a path, as it stands, is that of something in a folder."""
    return os.path.relpath(path, folder).split(os.sep)[0] != ".."


class ImageFolder:
    """A folder of images, and which of its files a name in an annotation file stands for.

    That is the file of this very name. Where there is none, the last part of the name is looked
    for in the folder itself: as it stands, then decoded from a URL (%20), in any Unicode form and
    in upper or lower case. One file must match; nothing is guessed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._listings: dict[str, set[str]] = {}

    def find(self, name: str) -> Path | None:
        """The file that a name stands for; None if there is none, or more than one."""
        return self._exact(name) or self._alike(name)

    def find_all(self, names: Sequence[str]) -> list[Path | None]:
        """The file of each name, as find gives it.

        None also for a name whose file was found by its last part alone, if another of the names
        stands for the same file: one image cannot be both left/1.png and right/1.png.
        """
        exact = [self._exact(name) for name in names]
        alike = [
            self._alike(name) if path is None else None
            for name, path in zip(names, exact, strict=True)
        ]
        taken = collections.Counter(path for path in alike if path is not None)
        taken.update({path for path in exact if path is not None and path in taken})
        return [
            path or (other if other is not None and taken[other] == 1 else None)
            for path, other in zip(exact, alike, strict=True)
        ]

    def hint(self, name: str) -> str:
        """What helps to find the file of a name that find or find_all did not find."""
        last, keys = _last_part(name), _keys(name)
        matches = sorted({file for key in keys for file in self._by_key.get(key, ())})
        if len(matches) == 1:
            return f"{matches[0]} would match, but other images of the file do, too"
        if matches:
            return f"{' and '.join(matches[:3])} match"
        below = [path for key in keys for path in self._below.get(key, ())]
        if below:
            return f"{Path(below[0]).name} lies in {Path(below[0]).parent}/"
        stem = os.path.splitext(_key(last))[0]
        others = [file for file in self._files if os.path.splitext(_key(file))[0] == stem]
        return f"{others[0]} is there" if others else ""

    def is_outside(self, name: str) -> bool:
        """Whether a name as it stands leads out of the folder, as ../x.png and /x.png do."""
        name = name.replace("\\", "/")
        if ".." not in name and not os.path.isabs(name):
            return False
        return not is_below(os.path.join(self.path, name), self.path)

    def _exact(self, name: str) -> Path | None:
        path = os.path.join(self.path, name)
        if self._is_file(path):
            return Path(path)
        if "\\" not in name:
            return None
        path = os.path.join(self.path, name.replace("\\", "/"))
        return Path(path) if self._is_file(path) else None

    def _is_file(self, path: str) -> bool:
        parent, name = os.path.split(path)
        # isfile is false for what is no name of a file at all, e.g. one with a zero byte.
        return name in self._listing(parent) or os.path.isfile(path)

    def _alike(self, name: str) -> Path | None:
        last = _last_part(name)
        if last in self._files:
            return self.path / last
        matches = {file for key in _keys(name) for file in self._by_key.get(key, ())}
        return self.path / matches.pop() if len(matches) == 1 else None

    @functools.cached_property
    def _files(self) -> set[str]:
        return self._listing(str(self.path))

    def _listing(self, folder: str) -> set[str]:
        """The files of a folder: one look instead of one at each of 118 287 files."""
        if folder not in self._listings:
            try:
                with os.scandir(folder or ".") as entries:
                    self._listings[folder] = {entry.name for entry in entries if _is_file(entry)}
            except (OSError, ValueError):
                self._listings[folder] = set()
        return self._listings[folder]

    @functools.cached_property
    def _by_key(self) -> dict[str, list[str]]:
        found = collections.defaultdict(list)
        for file in self._files:
            found[_key(file)].append(file)
        return found

    @functools.cached_property
    def _below(self) -> dict[str, list[str]]:
        """Files of the folders inside, by key, relative to the folder."""
        found = collections.defaultdict(list)
        for path in _walk(self.path):
            found[_key(os.path.basename(path))].append(path)
        return found


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads nowhere
        return False


def _walk(folder: Path, limit: int = 200_000) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in files:
            yield os.path.relpath(os.path.join(parent, file), folder)
        limit -= len(files) + len(folders)
        if limit < 0:
            return


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _key(name: str) -> str:
    """What names have in common that differ in the form of their letters only."""
    return unicodedata.normalize("NFC", name).casefold()


def _keys(name: str) -> set[str]:
    """The keys of what a name may mean, without the query of a URL too."""
    decoded = urllib.parse.unquote(name)
    texts = (name, decoded, name.partition("?")[0], decoded.partition("?")[0])
    return {_key(last) for last in map(_last_part, texts) if last}
