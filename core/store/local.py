"""Objects as files of a local directory. For one host: the demo, development, small installations."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from core.errors import InvalidKey, ObjectNotFound, StoreDenied, StoreUnavailable
from core.ports import ObjectStat
from core.store.keys import check_key, check_prefix
from core.store.links import LinkSigner

INCOMING = ".incoming"
"""Folder of unfinished writes. No key may begin with it."""

COPY_BYTES = 1024 * 1024


class LocalStore:
    """An ``ObjectStore`` in a directory, which is made if it is not there.

    A key is a path below the root, so a key cannot be both an object and the folder of another one. Files that
    somebody puts into the directory by hand are objects too; symbolic links that lead out of it are not.
    """

    def __init__(self, root: Path, signer: LinkSigner) -> None:
        self.signer = signer
        with _errors("the store's directory", root):
            (root / INCOMING).mkdir(parents=True, exist_ok=True)
            self.root = root.resolve()

    def path(self, key: str) -> Path:
        """Where the object lies, or would lie. Raises ``InvalidKey``."""
        check_key(key)
        if key.partition("/")[0] == INCOMING:
            msg = f"{key!r} is no object key: {INCOMING!r} is the store's own folder"
            raise InvalidKey(msg)
        path = self.root / key
        if not Path(os.path.realpath(path)).is_relative_to(self.root):
            msg = f"{key!r} is no object key: a symbolic link leads out of the store"
            raise InvalidKey(msg)
        return path

    def stat(self, key: str) -> ObjectStat:
        """Ask for an object's size."""
        path = self._existing(key)
        with _errors(key, path):
            return ObjectStat(key, path.stat().st_size)

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object into a new file."""
        source = self._existing(key)
        with _errors(key, source), _replacing(path, path.with_name(f".{uuid.uuid4().hex}")) as unfinished:
            shutil.copyfile(source, unfinished)

    def get_bytes(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Read an object or a part of it."""
        path = self._existing(key)
        with _errors(key, path), path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def put_file(self, key: str, path: Path, content_type: str) -> None:
        """Copy a file in."""
        del content_type  # told by the key's suffix when it is served
        with path.open("rb") as source, self._writing(key) as unfinished, unfinished.open("wb") as target:
            shutil.copyfileobj(source, target, COPY_BYTES)

    def put_bytes(self, key: str, data: bytes, content_type: str) -> None:
        """Write an object."""
        del content_type
        with self._writing(key) as unfinished:
            unfinished.write_bytes(data)

    def list(self, prefix: str) -> Iterator[ObjectStat]:
        """List the objects whose key begins with a prefix, in key order."""
        check_prefix(prefix)
        with _errors(prefix, self.root):
            yield from self._walk(self.root, "", prefix)

    def delete(self, key: str) -> None:
        """Remove an object; none of that key is no error."""
        with contextlib.suppress(ObjectNotFound):
            path = self._existing(key)
            with _errors(key, path):
                path.unlink()

    def url(self, key: str, *, expires_s: int) -> str:
        """Make a link to the API's file route that reads the object until it expires."""
        return self.signer.link(check_key(key), int(time.time()) + expires_s)

    def verify_url(self, key: str, expires: int, signature: str, now: float) -> bool:
        """Say whether a link's parts are as ``url`` made them and it has not expired at ``now`` (epoch seconds)."""
        return self.signer.verify(key, expires, signature, now)

    def _existing(self, key: str) -> Path:
        path = self.path(key)
        with _errors(key, path):
            if not path.is_file():
                raise _not_found(key)
        return path

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[Path]:
        """Give a file to fill; then make it the object, durably and at one stroke."""
        path = self.path(key)
        with _errors(key, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _replacing(path, self.root / INCOMING / uuid.uuid4().hex) as unfinished:
                yield unfinished
                _sync(unfinished)
            _sync(path.parent)

    def _walk(self, folder: Path, begin: str, prefix: str) -> Iterator[ObjectStat]:
        """List below one folder, whose keys begin with ``begin``. Sorted as keys: ``a-b`` comes before ``a/b``."""
        with os.scandir(folder) as entries:
            names = [f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries]
        for name in sorted(names, key=os.fsencode):
            key = begin + name
            if name.endswith("/"):
                if key != f"{INCOMING}/" and (key.startswith(prefix) or prefix.startswith(key)):
                    yield from self._walk(folder / name, key, prefix)
            elif key.startswith(prefix):
                with contextlib.suppress(InvalidKey, ObjectNotFound):  # no object, or gone meanwhile
                    yield self.stat(key)


@contextlib.contextmanager
def _replacing(path: Path, unfinished: Path) -> Iterator[Path]:
    """Rename ``unfinished`` to ``path`` if the block succeeds, remove it if not."""
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_found(key: str) -> ObjectNotFound:
    return ObjectNotFound(f"the store holds no object {key!r}")


@contextlib.contextmanager
def _errors(key: str, path: Path) -> Iterator[None]:
    """Turn the system's errors into the store's."""
    try:
        yield
    except FileNotFoundError as error:
        raise _not_found(key) from error
    except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        msg = f"{key!r} cannot be an object here: a part of it is another object, or it is a folder of others"
        raise InvalidKey(msg) from error
    except PermissionError as error:
        msg = f"the store may not read or write {path}: check the owner and mode of its directory"
        raise StoreDenied(msg) from error
    except OSError as error:
        msg = f"the store cannot read or write {path}: {error.strerror}"
        raise StoreUnavailable(msg) from error
