"""Data sets to codes: every image once, what cannot be read listed, interrupted runs taken up."""

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.data import CLASSES, datasets_table, png, rows, write_tar

from vqdeploy import shards
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.files import read_json, to_json
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.images import read, read_bytes
from vqdeploy.tokenize import tokenize
from vqdeploy.tokenize.part import _batches
from vqdeploy.tokenize.samples import Sample

pytestmark = pytest.mark.slow


def errors(codes):
    return {line["key"]: line["error"] for line in map(json.loads, (codes / "_errors.jsonl").read_text().splitlines())}


# What is written


def test_an_image_folder(plan, folder, tmp_path, expected, inline):
    summary = tokenize(plan, str(folder), tmp_path / "out", shard_size=4)
    assert (summary.images, summary.shards, summary.errors) == (10, 3, 0)
    assert rows(tmp_path / "out") == {
        f"{CLASSES[i % 2]}/{i}.png": (i % 2, CLASSES[i % 2], expected(i)) for i in range(10)
    }
    assert errors(tmp_path / "out") == {}
    provenance, tokenizer = Bundle(plan).manifest.provenance, Bundle(plan).manifest.tokenizer
    for name in shards.names(tmp_path / "out"):
        info, _ = shards.read_info(tmp_path / "out" / name)
        assert (info.origin.system, info.origin.checkpoint) == ("rqvae", provenance.checkpoint)
        assert (info.origin.maps, info.origin.codebook_size) == (tokenizer.maps, tokenizer.codebook_size)
        assert info.classes == CLASSES


def test_images_without_classes(plan, folder, tmp_path, inline):
    tokenize(plan, str(folder / "cat"), tmp_path / "out")
    assert {key: row[:2] for key, row in rows(tmp_path / "out").items()} == {
        f"{i}.png": (None, None) for i in (0, 2, 4, 6, 8)
    }


def test_the_maps_of_a_hierarchy_are_flattened(vqvae2_plan, vqvae2_pipeline, folder, tmp_path, inline):
    tokenize(vqvae2_plan, str(folder), tmp_path / "out")
    image = read(folder / "dog" / "3.png", *vqvae2_pipeline.image_shape[:2])
    assert rows(tmp_path / "out")["dog/3.png"][2] == vqvae2_pipeline.encode(image[None])[0].tolist()


def test_large_codebooks_take_int32(tmp_path):
    for size, kind in ((2**15, pa.int16()), (2**15 + 1, pa.int32())):
        origin = shards.Origin("", None, "", (4, 4, 3), ((1, 2, 1),), size)
        some = shards.Rows(["a"], [None], [None], [np.array([0, size - 1])])
        shards.write(tmp_path / f"{size}.parquet", shards.ShardInfo(origin, ""), some)
        column = pq.read_table(tmp_path / f"{size}.parquet")["codes"]
        assert column.type == pa.list_(kind, 2)
        assert column.to_pylist() == [[0, size - 1]]


# Tars of WebDataset


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_tars(plan, tmp_path, expected, inline, suffix, mode):
    members = [
        *(("a/0.png", png(0)), ("a/0.cls", b"1\n"), ("a/0.txt", b"not read")),
        *(("a/1.json", b'{"label": "dog", "x": [1]}'), ("a/1.png", png(1))),
        *(("2.PNG", png(2)), ("2.json", b'{"cls": 0}')),
        *(("./3.png", png(3)), ("./3.mask.png", png(9)), ("./3.cls", b"eel")),
        ("4.jpg", png(4)),  # the content says the format
    ]
    write_tar(tmp_path / "in" / f"one{suffix}", members[:5], mode)
    write_tar(tmp_path / "in" / f"two{suffix}", members[5:], mode)
    summary = tokenize(plan, str(tmp_path / "in"), tmp_path / "out")
    assert (summary.shards, shards.names(tmp_path / "out")) == (2, ["one.parquet", "two.parquet"])
    assert rows(tmp_path / "out") == {
        f"one{suffix}/a/0": (1, None, expected(0)),
        f"one{suffix}/a/1": (None, "dog", expected(1)),
        f"two{suffix}/2": (0, None, expected(2)),
        f"two{suffix}/3": (None, "eel", expected(3)),
        f"two{suffix}/4": (None, None, expected(4)),
    }


def test_labels_of_tars_are_not_lost(plan, tmp_path, expected, inline):
    members = [
        *(("a.1.5x.png", png(0)), ("a.1.5x.cls", b"3"), ("b.1.png", png(1)), ("b.cls", b"4")),
        *(("c.1.png", png(2)), ("c.1.json", b'{"label": null, "cls": 5}'), ("d.png", png(3)), ("d.mask.cls", b"6")),
        *(("e.png", png(4)), ("e.json", b'{"label": 0, "cls": 1}'), ("e.mask.json", b"{"), ("e.mask.png", b"")),
        *(("__MACOSX/f.png", b""), ("__MACOSX/g/._f.cls", b""), ("._f.png", b"")),
    ]
    tokenize(plan, str(write_tar(tmp_path / "x.tar", members)), tmp_path / "out")
    assert rows(tmp_path / "out") == {
        "x.tar/a": (3, None, expected(0)),
        "x.tar/b": (4, None, expected(1)),
        "x.tar/c": (5, None, expected(2)),
        "x.tar/e": (0, None, expected(4)),
    }
    assert list(errors(tmp_path / "out")) == ["x.tar/d"]
    assert "its class has another name, mask.cls" in errors(tmp_path / "out")["x.tar/d"]


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tgz", "w:gz")])
def test_tars_that_were_concatenated(plan, tmp_path, expected, inline, suffix, mode):
    paths = [write_tar(tmp_path / f"{i}{suffix}", [("0.png", png(i))], mode) for i in range(3)]
    contents = [path.read_bytes() for path in paths]
    whole = tmp_path / f"x{suffix}"
    whole.write_bytes(b"".join(contents))
    assert tokenize(plan, str(whole), tmp_path / "out").images == 3  # of one name, yet of three tars
    whole.write_bytes(contents[0] + contents[1] + contents[2][:700])
    with pytest.raises(ArtifactError, match="is damaged"):
        tokenize(plan, str(whole), tmp_path / "cut")


def test_a_range_of_tars(plan, tmp_path, inline):
    for i in (8, 9, 10, 11):
        write_tar(tmp_path / "in" / f"shard-{i:04}.tar", [("0.png", png(i))])
    tokenize(plan, str(tmp_path / "in" / "shard-{0009..0011}.tar"), tmp_path / "out")
    assert list(rows(tmp_path / "out")) == [f"shard-{i:04}.tar/0" for i in (9, 10, 11)]
    with pytest.raises(VqdeployError, match=r"there is no such data; expected .*, found .*shard-0012\.tar"):
        tokenize(plan, str(tmp_path / "in" / "shard-{0009..0012}.tar"), tmp_path / "other")
    for odd in ("{3..1}", "{0..99999999}"):
        with pytest.raises(VqdeployError, match="the range of files is empty or too large"):
            tokenize(plan, str(tmp_path / f"{odd}.tar"), tmp_path / "other")


def test_two_tars_of_one_name(plan, tmp_path, inline):
    for part in (0, 1):
        write_tar(tmp_path / f"in{part}" / "x.tar", [("0.png", png(part))])
    with pytest.raises(VqdeployError, match="2 files of the data would become the shard x"):
        tokenize(plan, str(tmp_path / "in{0..1}" / "x.tar"), tmp_path / "out")


def test_images_of_tars_that_cannot_be_used_are_listed(plan, tmp_path, expected, inline):
    members = [
        *(("0.png", png(0)), ("0.json", b"{")),
        ("1.png", png(1)[:100]),
        *(("2.cls", b"1"), ("3.a.png", png(3)), ("3.b.png", png(3))),
        *(
            ("4.png", png(4)),
            ("4.cls", b"-1"),
            ("5.png", png(5)),
            ("5.cls", b"\xff"),
            ("6.png", png(6)),
            ("6.png", png(7)),
        ),
        *(("7.png", png(7)), ("7.cls", b"99999999999"), ("8.png", png(8)), ("8.json", b'{"label": true}')),
        *(("9.png", png(9)), ("a.png", png(10)), ("a.json", b'{"label": "  "}')),
    ]
    write_tar(tmp_path / "in" / "x.tar", members)
    summary = tokenize(plan, str(tmp_path / "in" / "x.tar"), tmp_path / "out")
    assert rows(tmp_path / "out") == {
        "x.tar/4": (None, "-1", expected(4)),
        "x.tar/7": (None, "99999999999", expected(7)),
        "x.tar/9": (None, None, expected(9)),
    }
    assert sorted(errors(tmp_path / "out")) == [f"x.tar/{i}" for i in (0, 1, 2, 3, 5, 6, 8, "a")]
    assert summary.errors == 8


def test_links_in_tars_lead_nowhere(plan, tmp_path, inline):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    path = write_tar(tmp_path / "in" / "x.tar", [("0.png", png(0))])
    with tarfile.open(path, "a") as archive:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("2.png", tarfile.LNKTYPE), ("3.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    tokenize(plan, str(path), tmp_path / "out")
    assert list(rows(tmp_path / "out")) == ["x.tar/0"]


@pytest.mark.parametrize("form", ["GNU", "pax"])
def test_sparse_members_are_not_read(plan, tmp_path, expected, inline, form):
    """A few kilobytes could be gigabytes."""
    path = write_tar(tmp_path / "x.tar", [("0.png", png(0))])
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("1.png")
        if form == "pax":
            info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**28)}
            archive.addfile(info)
        else:
            info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            header[386:410], header[483:495] = b"%011o\0%011o\0" % (0, 0), b"%011o\0" % 2**28
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            archive.fileobj.write(header)
            archive.offset += 512
    assert tokenize(plan, str(path), tmp_path / "out").errors == 1
    assert rows(tmp_path / "out") == {"x.tar/0": (None, None, expected(0))}
    assert "a member is sparse" in errors(tmp_path / "out")["x.tar/1"]


def test_images_that_are_large_together_are_refused_and_those_of_a_batch_are_few(plan, tmp_path, monkeypatch, inline):
    samples = [Sample(str(i), png(0)) for i in range(10)]
    monkeypatch.setattr("vqdeploy.tokenize.part._BYTES", 2 * len(png(0)) + 1)
    assert [len(batch) for batch in _batches(iter(samples))] == [3, 3, 3, 1]
    monkeypatch.setattr("vqdeploy.tokenize.tars._MOST_BYTES", len(png(0)) + 9)
    members = [("0.png", png(0)), ("0.mask.png", b"x" * 10), ("1.png", png(0)), ("1.cls", b"7")]
    tokenize(plan, str(write_tar(tmp_path / "x.tar", members)), tmp_path / "out")
    assert list(rows(tmp_path / "out")) == ["x.tar/1"]
    assert "its members have more than" in errors(tmp_path / "out")["x.tar/0"]


def _header(kind, size):
    info = tarfile.TarInfo("0.png")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "damage",
    [
        "cut between members",
        "cut",
        "a bad header",
        "noise",
        "cut gzip",
        "empty",
        "a size beyond the end",
        "a long name",
    ],
)
def test_a_damaged_tar_stops_no_other_and_is_done_when_it_is_mended(plan, tmp_path, inline, damage):
    good = write_tar(tmp_path / "in" / "b.tar", [(f"{i}.png", png(i)) for i in range(9)])
    write_tar(tmp_path / "in" / "a.tar", [("0.png", png(0))])
    write_tar(tmp_path / "in" / "c.tar", [("0.png", png(1))])
    content = good.read_bytes()
    good.write_bytes(
        {
            "cut between members": content[:2048],
            "cut": content[: len(content) // 2 + 100],
            "a bad header": content[:2048] + bytes(8) + content[2056:],
            "noise": np.random.default_rng(0).bytes(4000),
            "cut gzip": gzip.compress(content)[:-3000],
            "empty": b"",
            "a size beyond the end": _header(tarfile.REGTYPE, 2**60),
            "a long name": gzip.compress(_header(tarfile.GNUTYPE_LONGNAME, 2**24) + b"x" * 2**24),
        }[damage]
    )
    with pytest.raises(ArtifactError, match=r"b\.tar is damaged \(.*\)\. Fix: repair or remove it, and run this again"):
        tokenize(plan, str(tmp_path / "in"), tmp_path / "out")
    assert shards.names(tmp_path / "out") == ["a.parquet", "c.parquet"]
    with pytest.raises(VqdeployError, match="is not complete"):
        shards.read(tmp_path / "out")
    good.write_bytes(content)
    assert tokenize(plan, str(tmp_path / "in"), tmp_path / "out").images == 11


# Parquet


def test_parquet_of_datasets(plan, tmp_path, expected, inline):
    (tmp_path / "in").mkdir()
    pq.write_table(datasets_table([0, 1, None, b"no image"]), tmp_path / "in" / "a.parquet")
    pq.write_table(datasets_table([2, 3, 5, 6], [0, None, 7, -1]), tmp_path / "in" / "b.parquet")
    tokenize(plan, str(tmp_path / "in"), tmp_path / "out")
    assert rows(tmp_path / "out") == {
        "a.parquet/0": (0, "cat", expected(0)),
        "a.parquet/1": (1, "dog", expected(1)),
        "b.parquet/0": (0, "cat", expected(2)),
        "b.parquet/1": (None, None, expected(3)),
        "b.parquet/3": (None, None, expected(6)),
    }
    assert sorted(errors(tmp_path / "out")) == ["a.parquet/2", "a.parquet/3", "b.parquet/2"]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet_of_plain_bytes(plan, tmp_path, expected, inline, kind):
    images = pa.array([png(i) for i in range(40)], kind)
    pq.write_table(pa.table({"img": images, "label": ["cat", "7"] * 20}), tmp_path / "x.parquet", row_group_size=7)
    tokenize(plan, str(tmp_path / "x.parquet"), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert list(found) == [f"x.parquet/{i}" for i in range(40)]
    assert found["x.parquet/30"] == (None, "cat", expected(30))
    assert found["x.parquet/31"] == (7, None, expected(31))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1 and so on", "is not a Parquet file"),
        (pa.table({"picture": [b"x"]}), "has no images; expected a column `image` of bytes, found picture"),
        (pa.table({"image": ["a path"]}), "has no images"),
        (pa.table({"image": [{"path": "x.png"}]}), "has no images"),
        (datasets_table([0], names=("a", "a")), "x.parquet have no valid names; expected different .*, found a, a"),
        (datasets_table([0], names=("a", "b\xa0b")), "have no valid names"),
        (datasets_table([0], names=("a", " ")), "have no valid names"),
    ],
)
def test_parquet_that_cannot_be_used(plan, tmp_path, inline, content, message):
    if isinstance(content, bytes):
        (tmp_path / "x.parquet").write_bytes(content)
    else:
        pq.write_table(content, tmp_path / "x.parquet")
    with pytest.raises(ArtifactError, match=message):
        tokenize(plan, str(tmp_path / "x.parquet"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "found"),
    [(("dog", "cat"), "dog, cat"), (("cat", "dog", "eel"), "cat, dog, eel"), ((), "none with names")],
)
def test_files_with_different_classes_are_refused(plan, tmp_path, inline, names, found):
    (tmp_path / "in").mkdir()
    pq.write_table(datasets_table([0, 1]), tmp_path / "in" / "a.parquet")
    pq.write_table(datasets_table([2, 3], names=names), tmp_path / "in" / "b.parquet")
    with pytest.raises(VqdeployError, match=f"a and b have different classes.*; expected cat, dog, found {found}"):
        tokenize(plan, str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What cannot be read


def test_damaged_images_are_listed_and_not_fatal(vqdeploy, plan, folder, tmp_path, inline):
    (folder / "cat" / "bad.png").write_bytes(png(0)[:200])
    (folder / "dog" / "bad.jpg").write_bytes(b"")
    code, out, _ = vqdeploy("tokenize", "--engine", plan, "--input", folder, "-o", "out", "--json")
    assert code == 0
    assert (json.loads(out)["images"], json.loads(out)["errors"]) == (10, 2)
    assert len(rows(tmp_path / "out")) == 10
    assert sorted(errors(tmp_path / "out")) == ["cat/bad.png", "dog/bad.jpg"]
    assert "is not an image that can be read" in errors(tmp_path / "out")["dog/bad.jpg"]


def test_no_image_can_be_read(vqdeploy, plan, tmp_path, inline):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(b"no")
    code, _, err = vqdeploy("tokenize", "--engine", plan, "--input", "in", "-o", "out")
    assert (code, err.splitlines()[-1]) == (1, "error: no image of in could be read. Fix: see out/_errors.jsonl")
    assert list(errors(tmp_path / "out")) == ["0.png"]


def test_names_that_cannot_be_printed(plan, tmp_path, inline):
    (tmp_path / "in").mkdir()
    for number, name in enumerate((b"a\xff.png", b"b\n.png", "ü.png".encode())):
        with open(os.fsencode(tmp_path / "in") + b"/" + name, "wb") as file:
            file.write(png(number) if number else b"no image")
    tokenize(plan, str(tmp_path / "in"), tmp_path / "out")
    assert list(rows(tmp_path / "out")) == ["b\\n.png", "ü.png"]
    assert list(errors(tmp_path / "out")) == ["a\\udcff.png"]
    write_tar(tmp_path / "in.tar", [("a\udcff.png", png(0)), ("b\n.png", png(1))])
    tokenize(plan, str(tmp_path / "in.tar"), tmp_path / "of-tar")
    assert list(rows(tmp_path / "of-tar")) == ["in.tar/a\\udcff", "in.tar/b\\n"]


@pytest.mark.parametrize("data", ["x\udcff.tar", "x\udcff.parquet", "x\udcff"])
def test_paths_that_are_not_utf_8(vqdeploy, plan, tmp_path, inline, data):
    write_tar(tmp_path / "x\udcff.tar", [("0.png", png(0)), ("0.cls", b"0")])
    pq.write_table(datasets_table([0]), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(tmp_path / "x\udcff.parquet")
    (tmp_path / "x\udcff").mkdir()
    (tmp_path / "x\udcff" / "0.png").write_bytes(png(0))
    code, out, err = vqdeploy("tokenize", "--engine", plan, "--input", data, "-o", "codes\udcfe", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == len(shards.read(tmp_path / "codes\udcfe").codes) == 1


def test_the_limit_of_pixels_holds(plan, tmp_path, inline, monkeypatch):
    monkeypatch.setattr("vqdeploy.runtime.images.MOST_PIXELS", 24 * 18)
    write_tar(tmp_path / "in" / "x.tar", [("0.png", png(0)), ("1.png", png(1, (25, 18)))])
    tokenize(plan, str(tmp_path / "in"), tmp_path / "out")
    assert list(rows(tmp_path / "out")) == ["x.tar/0"]
    assert "25 x 18 pixels" in errors(tmp_path / "out")["x.tar/1"]


def test_images_of_files_and_of_bytes_are_read_alike(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 4), np.uint8), "RGBA")
    file = io.BytesIO()
    image.save(file, format="PNG")
    (tmp_path / "x.png").write_bytes(file.getvalue())
    for size in ((), (16,), (16, 24)):
        assert np.array_equal(read(tmp_path / "x.png", *size), read_bytes(file.getvalue(), "x", *size))


# Again


def test_a_run_again_does_nothing(plan, folder, tmp_path, inline):
    tokenize(plan, str(folder), tmp_path / "out", shard_size=4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    seen = []
    summary = tokenize(plan, str(folder), tmp_path / "out", shard_size=4, report=lambda *done: seen.append(done))
    assert (summary.images, seen) == (10, [])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")} == before


def test_a_run_again_makes_what_is_missing(plan, folder, tmp_path, inline):
    tokenize(plan, str(folder), tmp_path / "out", shard_size=4)
    before = rows(tmp_path / "out")
    (tmp_path / "out" / "000001.parquet").unlink()
    seen = []
    tokenize(plan, str(folder), tmp_path / "out", shard_size=4, report=lambda *done: seen.append(done[1:]))
    assert (rows(tmp_path / "out"), seen) == (before, [(3, 3)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "cat" / "0.png").write_bytes(png(77)), "codes of other data"),
        (lambda folder: (folder / "cat" / "00.png").write_bytes(png(78)), "codes of other data"),
        (lambda folder: (folder / "cat" / "0.png").rename(folder / "dog" / "0.png"), "codes of other data"),
        (lambda folder: (folder / "cat").rename(folder / "bat"), "codes of other data"),
        (lambda folder: [(folder / "dog" / f"{i}.png").unlink() for i in (3, 5, 7, 9)], "codes of other data"),
    ],
)
def test_other_data_are_refused(plan, folder, tmp_path, inline, change, message):
    tokenize(plan, str(folder), tmp_path / "out", shard_size=4)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    change(folder)
    with pytest.raises(VqdeployError, match=message):
        tokenize(plan, str(folder), tmp_path / "out", shard_size=4)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_other_arguments_are_refused(plan, portable_plan, vqvae2_plan, folder, tmp_path, inline):
    tokenize(plan, str(folder), tmp_path / "out", shard_size=4)
    for other in (portable_plan, vqvae2_plan):
        with pytest.raises(VqdeployError, match="holds codes of another plan"):
            tokenize(other, str(folder), tmp_path / "out", shard_size=4)
    with pytest.raises(VqdeployError, match="or of shards of another size"):
        tokenize(plan, str(folder), tmp_path / "out", shard_size=5)
    (tmp_path / "out" / "000000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError, match=r"000000\.parquet is not a shard of codes"):
        tokenize(plan, str(folder), tmp_path / "out", shard_size=4)


def test_what_is_not_ours_is_not_touched(plan, folder, tmp_path, inline):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(VqdeployError, match="holds something else"):
        tokenize(plan, str(folder), tmp_path / "out")
    for output in (folder, folder / "cat", tmp_path):
        with pytest.raises(VqdeployError, match=r"holds the input|lies in .*, which is an input|holds something else"):
            tokenize(plan, str(folder), output)
    with pytest.raises(VqdeployError, match="there is no such data"):
        tokenize(plan, str(tmp_path / "nowhere"), tmp_path / "other")
    with pytest.raises(VqdeployError, match="there is no such data"):
        tokenize(plan, str(plan), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("other", ["cat/0.png", "0.PNG", "deep/er/more.tar", "sub/x.parquet"])
def test_archives_beside_other_data_are_refused(plan, tmp_path, inline, other):
    write_tar(tmp_path / "in" / "backup.tar", [("0.png", png(0))])
    for name in (".hidden/0.png", "notes/readme.txt", "@eaDir/0.png", other):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(1))
    with pytest.raises(VqdeployError, match=rf"in holds tars .*: backup\.tar beside {other}; expected"):
        tokenize(plan, str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / other).unlink()
    assert tokenize(plan, str(tmp_path / "in"), tmp_path / "out").images == 1


def test_a_hidden_archive_is_no_data(plan, folder, tmp_path, inline):
    (folder / "._a.tar").write_bytes(b"x")
    assert tokenize(plan, str(folder), tmp_path / "out").images == 10


# Processes


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixty images in two classes."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(60):
        path = folder / CLASSES[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(i))
    return folder


def test_a_killed_run_goes_on_where_it_was(command, plan, many, tmp_path):
    arguments = ["tokenize", "--engine", plan, "--input", many, "--shard-size", 2, "--workers", 2, "-o"]
    line = [command.script, *map(str, arguments), tmp_path / "cut"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)  # noqa: S603
    while not re.search(r"tokenizing 5 of 30", process.stderr.readline()):
        assert process.poll() is None
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid)  # no worker outlives it
    done = shards.names(tmp_path / "cut")
    assert 5 <= len(done) < 30
    with pytest.raises(VqdeployError, match="is not complete"):
        shards.read(tmp_path / "cut")
    resumed = command(*arguments, tmp_path / "cut")
    assert resumed.returncode == 0, resumed.stderr
    assert len(resumed.stderr.splitlines()) == 30 - len(done)
    whole = command(*arguments, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert pq.read_table(tmp_path / "cut").equals(pq.read_table(tmp_path / "whole"))
    assert len(rows(tmp_path / "cut")) == 60
    assert read_json(tmp_path / "cut" / "_summary.json") == read_json(tmp_path / "whole" / "_summary.json")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_a_killed_worker_is_one_sentence(command, plan, many, tmp_path):
    arguments = [
        "tokenize",
        "--engine",
        plan,
        "--input",
        many,
        "--shard-size",
        2,
        "--workers",
        2,
        "-o",
        tmp_path / "cut",
    ]
    line = [command.script, *map(str, arguments)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)  # noqa: S603
    while not re.search(r"tokenizing 5 of 30", process.stderr.readline()):
        assert process.poll() is None
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    said = process.stderr.read().splitlines()
    assert process.wait() == 2
    assert said[-1] == "error: a process was killed. Fix: run this again, with fewer --workers if the memory was short"
    assert command(*arguments).returncode == 0
    assert len(rows(tmp_path / "cut")) == 60


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_ends_the_workers_at_once(command, plan, many, tmp_path):
    arguments = ["tokenize", "--engine", plan, "--input", many, "--shard-size", 2, "--workers", 1, "-o"]
    line = [command.script, *map(str, arguments), tmp_path / "cut"]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)  # noqa: S603
    process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_processes_run_no_file_of_the_current_folder(command, plan, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    (tmp_path / "here").mkdir()
    for name in ("multiprocessing", "pickle", "struct", "signal", "numpy"):
        (tmp_path / "here" / f"{name}.py").write_text("open(__file__ + '.ran', 'w')")
    before = os.listdir(tmp_path / "here")
    arguments = ["tokenize", "--engine", plan, "--input", folder, "--workers", 1, "-o", tmp_path / "out"]
    done = command(*arguments, cwd=tmp_path / "here")
    assert (done.returncode, os.listdir(tmp_path / "here")) == (0, before)
    assert len(rows(tmp_path / "out")) == 10


def test_tokenizing_needs_no_torch_and_no_onnx(plan, many, tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "for name in ('torch', 'onnx', 'lightning', 'ray'): sys.modules[name] = None\n"
        "from vqdeploy.tokenize import tokenize\n"
        "if __name__ == '__main__':\n"
        "    print(tokenize(Path(sys.argv[1]), sys.argv[2], Path('out'), workers=1).images)\n"
    )
    (tmp_path / "script.py").write_text(script)
    line = [sys.executable, tmp_path / "script.py", plan, many]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603
    assert (ended.returncode, ended.stdout) == (0, "60\n"), ended.stderr


def test_ranges_are_multiplied_before_they_are_listed(plan, tmp_path, inline):
    for data in ("x-{0..999999}-{0..999999}.tar", "x-{2..1}.tar"):
        with pytest.raises(VqdeployError, match="the range of files is empty or too large"):
            tokenize(plan, data, tmp_path / "out")
    for name in ("a08-1", "a08-2", "a09-1", "a09-2"):
        write_tar(tmp_path / f"{name}.tar", [("0.png", png(0))])
    assert tokenize(plan, f"{tmp_path}/a{{08..09}}-{{1..2}}.tar", tmp_path / "out").images == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": ((2**20, 2**20, 4),)}, "no such size"),
        ({"maps": ((-1, 2, 1),)}, "no such size"),
        ({"maps": ()}, "no such size"),
        ({"codebook_size": 0}, "no such size"),
        ({"classes": ("a", "a")}, "no valid names"),
        ({"classes": ("\x1b[31ma",)}, "no valid names"),
    ],
)
def test_shards_that_say_what_cannot_be(tmp_path, changes, message):
    origin = shards.Origin("", None, "", (4, 4, 3), ((1, 2, 1),), 16)
    file = tmp_path / "0.parquet"
    shards.write(file, shards.ShardInfo(origin, ""), shards.Rows(["a"], [0], ["a"], [np.array([0, 1])]))
    table = pq.read_table(file)
    classes = changes.pop("classes", ())
    info = shards.ShardInfo(replace(origin, **changes), "", classes)
    (key,) = (key for key in table.schema.metadata if b"vqdeploy" in key)
    pq.write_table(table.replace_schema_metadata({key: to_json(info.to_dict())}), file)
    with pytest.raises(ArtifactError, match=message):
        shards.read_info(file)


def test_a_pipe_among_shards_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "0.parquet")
    with pytest.raises(VqdeployError, match="is not a regular file"):
        shards.read_info(tmp_path / "0.parquet")
