"""Rows of data sets, their images, and the rows that cannot be used."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from profiling.probing import SIZES, lines, options, write_data

from mergekit_snrf.errors import SnrfError
from mergekit_snrf.profiling.probes.images import MAX_BYTES, decode, image_folders, read_image
from mergekit_snrf.profiling.probes.source import RowError

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


class TestRows:
    def test_every_kind_of_file_gives_the_same_rows(self, tmp_path):
        content = [{"q": f"question, {i}", "a": i * 1.5} for i in range(4)]
        table = datasets.Dataset.from_list(content)
        table.to_csv(tmp_path / "rows.csv")
        table.to_parquet(tmp_path / "rows.parquet")
        (tmp_path / "rows.json").write_text(json.dumps(content))
        lines(tmp_path / "rows.jsonl", content)
        for suffix in ("csv", "parquet", "json", "jsonl"):
            config = options("m", tmp_path / f"rows.{suffix}", answer={"by": "column", "column": "a"})
            rows = config.rows().rows
            assert [(row.number, row.question, row.answer) for row in rows] == [
                (i, f"question, {i}", str(i * 1.5)) for i in range(4)
            ]

    def test_a_sparse_file_is_not_read(self, tmp_path):
        with (tmp_path / "rows.jsonl").open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(SnrfError, match="is not text"):
            options("m", tmp_path / "rows.jsonl").rows()

    def test_the_draw_never_changes(self, tmp_path):
        path = lines(tmp_path / "rows.jsonl", [{"q": str(i)} for i in range(20)])
        drawn = {
            (seed, limit): [row.number for row in options("m", path, seed=seed, limit=limit).rows().rows]
            for seed, limit in ((0, 4), (0, 8), (1, 4), (0, 20), (0, 99))
        }
        # Written down once: the stream of MT19937 is the same on every machine and in every version of numpy.
        assert drawn[0, 4] == [6, 14, 15, 16]
        assert set(drawn[0, 4]) < set(drawn[0, 8])
        assert drawn[1, 4] != drawn[0, 4]
        assert drawn[0, 20] == drawn[0, 99] == list(range(20))

    @pytest.mark.parametrize(
        ("keys", "field"),
        [
            ({"question": "problem"}, "question"),
            ({"images": "image"}, "images"),
            ({"template": "{solution}"}, "template"),
            ({"answer": {"by": "column", "column": "reply"}}, "answer"),
        ],
    )
    def test_a_wrong_column_is_named_with_its_field(self, data, keys, field):
        with pytest.raises(SnrfError, match="has no column") as caught:
            options("m", data / "images.jsonl", **keys).rows()
        assert (caught.value.where, caught.value.field) == (str(data / "images.jsonl"), field)

    def test_bad_rows_are_named_and_counted_up_to_a_twentieth(self, tmp_path, caplog):
        content: list[dict[str, Any]] = [{"q": f"question {i}"} for i in range(40)]
        content[7]["q"], content[30]["q"] = None, "  "
        path = lines(tmp_path / "rows.jsonl", content)
        with caplog.at_level(logging.WARNING):
            rows = options("m", path).rows()
        assert [(number, error.what) for number, error in rows.bad.items()] == [
            (7, "column 'q' is empty"),
            (30, "column 'q' is empty"),
        ]
        assert len(rows) == 38
        assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
            "row 7: column 'q' is empty; left out",
            "row 30: column 'q' is empty; left out",
        ]
        content[31]["q"] = None
        lines(path, content)
        with pytest.raises(SnrfError, match=r"3 of 40 rows cannot be used \(row 7: column 'q' is empty; row 30: "):
            options("m", path).rows()

    @pytest.mark.parametrize(
        ("question", "message"), [(["a", "b"], "row 0: column 'q' holds list, not text"), (" ", "column 'q' is empty")]
    )
    def test_one_reason_for_all_rows_is_said_once(self, tmp_path, question, message):
        rows = 1 if isinstance(question, list) else 9
        with pytest.raises(SnrfError) as caught:
            options("m", lines(tmp_path / "rows.jsonl", [{"q": question}] * rows)).rows()
        assert str(caught.value).count(message) == 1

    def test_one_row_that_is_not_utf_8_is_one_bad_row(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b'{"q": "a"}\n' * 30 + b'{"q": "\xff\xfe"}\n' + b'{"q": "b"}\n')
        rows = options("m", path).rows()
        assert (list(rows.bad), len(rows)) == ([30], 31)

    @pytest.mark.parametrize("content", ['{"q": 1}\n{"q": ', ""])
    def test_a_damaged_file_is_named(self, tmp_path, content):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(SnrfError) as caught:
            options("m", tmp_path / "rows.jsonl").rows()
        assert caught.value.where == str(tmp_path / "rows.jsonl")

    @pytest.mark.parametrize("name", ["nothing.jsonl", "/nothing.txt", "/nothing", "./nothing", "nothing.txt", "a/b"])
    def test_a_data_set_that_cannot_be_found_is_named(self, name):
        with pytest.raises(SnrfError) as caught:
            options("m", name).rows()
        assert (caught.value.where, caught.value.field) == (name, "dataset")

    def test_a_file_of_another_kind_or_with_keys_of_the_hub_is_an_error(self, tmp_path, data):
        (tmp_path / "rows.xml").write_text("<q/>")
        with pytest.raises(SnrfError, match="ends in one of"):
            options("m", tmp_path / "rows.xml").rows()
        with pytest.raises(SnrfError) as caught:
            options("m", data / "texts.jsonl", config="main").rows()
        assert caught.value.field == "config"
        assert len(options("m", data / "texts.jsonl", split="train[:2]").rows()) == 2


class TestImages:
    def test_paths_bytes_and_features_give_the_same_pixels(self, data):
        files = [data / "0.png", data / "1.png"]
        rows = {"q": ["a"], "bytes": [[path.read_bytes() for path in files]]}
        rows["paths"] = [[path.name for path in files]]
        rows["both"] = [[{"bytes": path.read_bytes(), "path": path.name} for path in files]]
        rows["feature"] = rows["both"]
        rows["one"] = [rows["both"][0][0]]
        table = datasets.Dataset.from_dict(rows)
        table = table.cast_column("feature", datasets.List(datasets.Image())).cast_column("one", datasets.Image())
        table.to_parquet(data / "rows.parquet")
        expected = [np.asarray(Image.open(path)) for path in files]
        sums = set()
        for column in ("bytes", "paths", "both", "feature", "one"):
            loaded_rows = options("m", data / "rows.parquet", images=column).rows()
            images = loaded_rows.images(loaded_rows.rows[0])
            assert [np.array_equal(np.asarray(i), e) for i, e in zip(images, expected, strict=False)] == [True] * (
                1 if column == "one" else 2
            )
            sums.add(loaded_rows.rows[0].images[:1])
        assert len(sums) == 1

    def test_a_path_is_looked_for_beside_the_file(self, data, monkeypatch):
        monkeypatch.chdir(data.parent)
        rows = options("m", data / "images.jsonl", images="images").rows()
        assert [image.size for row in rows.rows for image in rows.images(row)] == [
            *SIZES[:4],
            SIZES[0],
            *SIZES[4:],
        ]

    def test_images_are_upright_and_rgb(self, tmp_path):
        picture = Image.new("P", (6, 3))
        picture.putpalette([255, 0, 0] + [0] * 765)
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
        picture.save(tmp_path / "palette.png")
        path = lines(tmp_path / "rows.jsonl", [{"q": "a", "images": ["turned.jpg", "palette.png"]}])
        rows = options("m", path, images="images").rows()
        turned, palette = rows.images(rows.rows[0])
        assert (turned.size, turned.mode) == ((3, 6), "RGB")
        assert palette.getpixel((0, 0)) == (255, 0, 0)

    def test_a_row_without_a_readable_image_is_bad(self, tmp_path, data):
        whole = (data / "2.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.png").write_text("no image")
        entries = [["nothing.png"], [], None, ["cut.png"], ["text.png"], [None]]
        path = lines(tmp_path / "rows.jsonl", [{"q": "a", "images": entry} for entry in entries])
        with pytest.raises(SnrfError) as caught:
            options("m", path, images="images").rows()
        for fragment in (
            "6 of 6 rows cannot be used",
            "nothing.png' cannot be read",
            "row 1: no image in column 'images'; row 2: no image",
            "row 3: an image of",
            "row 4: an image of 8 bytes cannot be decoded",
            "; ...",
        ):
            assert fragment in str(caught.value)

    @pytest.mark.parametrize("path", ["/etc/hostname", "../secret.png", "/dev/zero", "pipe", "a\0b", "folder"])
    def test_a_path_must_lead_to_a_file_in_the_folder_of_the_data(self, tmp_path, path):
        data = tmp_path / "data"
        (data / "folder").mkdir(parents=True)
        (tmp_path / "secret.png").write_bytes(b"secret")
        os.mkfifo(data / "pipe")
        with pytest.raises(RowError):
            read_image(path, image_folders(data))
        (data / "link.png").symlink_to(tmp_path / "secret.png")
        for link in ("link.png", str(data / "link.png")):
            assert read_image(link, image_folders(data)) == b"secret", "whoever owns the folder may put links in it"

    def test_an_image_has_limits_of_bytes_and_pixels(self, tmp_path):
        with (tmp_path / "sparse.png").open("wb") as file:
            file.truncate(MAX_BYTES + 1)
        with pytest.raises(RowError, match="more than the limit"):
            read_image("sparse.png", [tmp_path])
        picture = io.BytesIO()
        Image.new("1", (13_000, 13_000)).save(picture, "PNG")
        with pytest.raises(RowError, match=r"13000 x 13000 pixels is larger than 80 megapixels"):
            decode(picture.getvalue())

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "DDS", "WEBP", "AVIF", "ICO", "TGA"])
    def test_a_damaged_image_of_any_format_is_bad_or_decoded(self, kind):
        Image.init()
        if kind not in Image.SAVE:
            pytest.skip("Pillow cannot write it")
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (1, 2, 3)).save(file, kind)
        whole, draw = file.getvalue(), np.random.RandomState(0)
        for _ in range(40):
            damaged = bytearray(whole[: draw.randint(1, len(whole) + 1)])
            for place in draw.randint(0, len(damaged), 8):
                damaged[place] = draw.randint(256)
            with contextlib.suppress(RowError):
                assert decode(bytes(damaged)).mode == "RGB"
