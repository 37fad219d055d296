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
