import base64

import pytest

from sktransfer.utils.tables import (
    format_bytes,
    format_seconds,
    html_image,
    html_list,
    html_table,
    text_table,
)


def test_text_table_aligns_columns_without_trailing_spaces():
    table = text_table(["name", "size", "kind"], [["a", "10", "x"], ["bcde", "5", ""]], left=[0, 2])
    assert table.splitlines() == ["name  size  kind", "a       10  x", "bcde     5"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1234, "1.2 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (45_783_040, "46 MB"),
        (9_960_000, "10 MB"),
        (3.5e9, "3.5 GB"),
        (1234e12, "1,234 TB"),
    ],
)
def test_bytes_have_a_unit(count, shown):
    assert format_bytes(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.04, "0 s"),
        (0.25, "0.2 s"),
        (9.97, "10 s"),
        (99.4, "99 s"),
        (99.6, "1.7 min"),
        (239.9, "4 min"),
        (3600, "60 min"),
        (9000, "2.5 h"),
        (1e6, "278 h"),
    ],
)
def test_seconds_have_a_unit(seconds, shown):
    assert format_seconds(seconds) == shown


def test_html_table_escapes_text_but_not_html():
    image = html_image(b"jpeg", '"a" & <b>')
    page = html_table(["<i>", "size"], [[image, "<b>"]], left=[0])
    assert page.count("<tr>") == 2
    assert "&lt;i&gt;" in page
    assert "&lt;b&gt;</td>" in page
    assert f'<img src="data:image/jpeg;base64,{base64.b64encode(b"jpeg").decode()}"' in page
    assert 'alt="&quot;a&quot; &amp; &lt;b&gt;"' in page
    assert page.count("text-align: left") == page.count("text-align: right") == 2


def test_html_image_has_a_limited_size_and_a_border():
    image = html_image(b"jpeg", "")
    assert "max-height: 6em; max-width: 12em; border: 1px" in image


def test_html_table_may_break_paths():
    assert ">a/<wbr>b.png</td>" in html_table(["path"], [["a/b.png"]], left=[0])


def test_html_list_escapes_its_items_and_replaces_invalid_characters():
    assert html_list(["<b>", "caf\udce9"]) == "<ul><li>&lt;b&gt;</li><li>caf?</li></ul>"
