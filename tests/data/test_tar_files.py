import io
import tarfile
import tracemalloc

import pytest

from sktransfer.data.tar_files import TarList


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_members_have_their_bytes(tar_format, tmp_path):
    long = f"{'folder/' * 20}ä.jpg" if tar_format != tarfile.USTAR_FORMAT else "a.jpg"
    contents = {"./b.PNG": b"b" * 600, long: b"a", "empty.webp": b""}
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in {**contents, "a.txt": b"text"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    images = TarList([tmp_path / "a.tar"]).read(0, 3)
    assert dict(zip(images.keys, images.items, strict=True)).keys() == contents.keys()
    assert [member.read_bytes() for member in images.items] == list(contents.values())
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(OSError, match="got 0 bytes, but expected 600"):
        images.items[0].read_bytes()


def test_damaged_tar_files_are_refused_wherever_the_damage_is(tmp_path):
    path = tmp_path / "a.tar"
    offsets = []
    with tarfile.open(path, "w") as tar:
        for row in range(4):
            offsets.append(tar.offset)
            info = tarfile.TarInfo(f"{row}.jpg")
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
        end = tar.offset
    content = path.read_bytes()
    damaged = {
        "is cut off at byte 6,144": content[:end],
        "is cut off at byte 6,244": content[: end + 100],
        "is cut off at byte 3,172": content[: offsets[2] + 100],
        "unexpected end of data": content[: offsets[2] + 600],
        "header at byte 3,072 is damaged": content[:3072] + b"y" + content[3073:],
        f"there is more at byte {len(content):,}": content + content,
        "there is more at byte 4,096": content[:3072] + bytes(1024) + content[3072:],
        "there is more at byte 10,239": content[:-1] + b"x",
    }
    for message, changed in damaged.items():
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=f"a.tar', which is not .*{message}.*pack it again"):
            TarList([path])
    for complete in (content, content[: end + 512], content + bytes(200_000)):
        path.write_bytes(complete)
        assert len(TarList([path])) == 4


def test_sparse_members_have_a_reason(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000001000\0" + b"00000001000\0"  # 512 bytes at byte 512
    header[483:495] = b"00000002000\0"  # of a file of 1,024 bytes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + b"x" * 512 + bytes(1024))
    images = TarList([tmp_path / "a.tar"])
    assert len(images) == 1
    with pytest.raises(OSError, match="it is a sparse file; pack the tar file without --sparse"):
        images.read(0, 1).items[0].read_bytes()


def test_labels_that_cannot_be_read_are_named(tmp_path):
    link, binary = tarfile.TarInfo("a.cls"), tarfile.TarInfo("a.cls")
    link.type, link.linkname, binary.size = tarfile.SYMTYPE, "b.cls", 1
    for info, reason in ((link, "it is a link"), (binary, "can't decode byte 0xe9")):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
            tar.addfile(info, io.BytesIO(b"\xe9"))
        with pytest.raises(ValueError, match=f"the label 'a.cls' in '.*a.tar', .*{reason}"):
            TarList([tmp_path / "a.tar"]).read(0, 1)


def test_memory_of_counting_does_not_grow_with_the_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for row in range(3000):
            tar.addfile(tarfile.TarInfo(f"{row}.jpg"))
            tar.members.clear()
    tracemalloc.start()
    try:
        images = TarList([tmp_path / "a.tar"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(images) == 3000
    assert peak < 200_000
