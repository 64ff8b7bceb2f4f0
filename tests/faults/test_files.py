"""Files that come from elsewhere: nothing is unpickled, nothing lands outside its folder."""

import contextlib
import io
import os
import re
import tarfile
import zipfile
import zlib

import numpy as np
import pytest

from predoc_lib.files import FileError, extract, read_npz, whole


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_plain_arrays_are_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.eye(2))
    found = read_npz(tmp_path / "a.npz")
    assert found["x"].tolist() == [0, 1, 2]
    assert found["y"].shape == (2, 2)
    np.save(tmp_path / "b.npy", np.ones(2))
    assert read_npz(tmp_path / "b.npy")["array"].tolist() == [1, 1]


def test_arrays_of_objects_are_refused_and_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([Evil(tmp_path / "harm")], dtype=object))
    with pytest.raises(FileError, match="Python objects, which are never unpickled"):
        read_npz(tmp_path / "a.npz")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [None, b"", b"junk", b"PK\x03\x04 half a zip"])
def test_what_is_no_array_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=str(path)):
        read_npz(path)


@pytest.mark.parametrize("error", [zlib.error, RuntimeError, NotImplementedError, EOFError, KeyError, MemoryError])
def test_whatever_a_reader_raises_the_file_is_named(tmp_path, monkeypatch, error):
    def fails(*arguments, **options):
        raise error("odd bytes")

    np.savez(tmp_path / "a.npz", x=np.ones(2))
    monkeypatch.setattr(np, "load", fails)
    with pytest.raises(FileError, match=r"a\.npz is refused: .*odd bytes.*Wanted"):
        read_npz(tmp_path / "a.npz")
    for module, name, good in ((zipfile, "ZipFile", "a.npz"), (tarfile, "open", "a.tar")):
        (tmp_path / "a.tar").write_bytes(b"")
        monkeypatch.setattr(module, name, fails)
        with pytest.raises(FileError, match=rf"{re.escape(good)} cannot be unpacked: .*odd bytes"):
            extract(tmp_path / good, tmp_path / "in")
    assert not (tmp_path / "in").exists()


def test_a_member_that_is_damaged_or_encrypted_is_refused_when_it_is_read(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", x=np.zeros(10_000))
    good = (tmp_path / "good.npz").read_bytes()
    damaged, encrypted = bytearray(good), bytearray(good)
    damaged[60:80] = b"\xff" * 20  # in the middle of the compressed member
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(signature) + flags] |= 1
    for content in (damaged, encrypted):
        path = tmp_path / "a.npz"
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"a\.npz is refused"):
            read_npz(path)
        with pytest.raises(FileError, match=r"a\.npz cannot be unpacked"):
            extract(path, tmp_path / "in")


def tar(path, name, kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, "w:gz") as file:
        good = tarfile.TarInfo("good.txt")
        good.size = 2
        file.addfile(good, io.BytesIO(b"ok"))
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, link
        file.addfile(entry, io.BytesIO(b""))


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/tmp/predoc-out.txt"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_with_a_path_outside_is_refused_before_anything_is_unpacked(tmp_path, name, kind):
    archive, folder = tmp_path / f"a.{kind}", tmp_path / "in" / "side"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("good.txt", "ok")
            file.writestr(name, "bad")
    else:
        tar(archive, name)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(FileError, match="is refused"):
        extract(archive, folder)
    assert set(tmp_path.rglob("*")) == before
    assert not os.path.exists("/tmp/predoc-out.txt")


@pytest.mark.parametrize(
    ("kind", "link"),
    [(tarfile.SYMTYPE, "/etc"), (tarfile.SYMTYPE, "../.."), (tarfile.LNKTYPE, "good.txt"), (tarfile.CHRTYPE, "")],
)
def test_links_and_devices_are_refused(tmp_path, kind, link):
    tar(tmp_path / "a.tar.gz", "entry", kind, link)
    with pytest.raises(FileError, match="is refused"):
        extract(tmp_path / "a.tar.gz", tmp_path / "inside")
    assert not (tmp_path / "inside" / "good.txt").exists()


def test_good_archives_are_unpacked_and_damaged_ones_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("b/c.txt", "ok")
    extract(tmp_path / "a.zip", tmp_path / "zip")
    assert (tmp_path / "zip" / "b" / "c.txt").read_text() == "ok"
    tar(tmp_path / "a.tar.gz", "more.txt")
    extract(tmp_path / "a.tar.gz", tmp_path / "tar")
    assert (tmp_path / "tar" / "good.txt").read_text() == "ok"
    (tmp_path / "bad.tar").write_bytes(b"junk")
    for name in ("bad.tar", "absent.tar"):
        with pytest.raises(FileError, match=name):
            extract(tmp_path / name, tmp_path / "bad")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with whole(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with contextlib.suppress(RuntimeError), whole(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_killed_writes_left_goes_at_the_next_write_and_nothing_else_does(tmp_path):
    others = [".other.99", "file[1].99", ".file1.99", ".file[1]", "file[2]"]
    left = [".file[1].99", ".file[1].1234567"]
    for name in (*others, *left):
        (tmp_path / name).write_text("half")
    with whole(tmp_path / "file[1]") as temporary:
        assert not any((tmp_path / name).exists() for name in left)
        temporary.write_text("one")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "file[1]"])
    assert (tmp_path / "file[1]").read_text() == "one"
