"""`radrotator rotate - -o -`: a radiograph from another program, a view to another one; nothing but the picture on
standard output, every word on the error stream."""
import io, os, pty, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image

from radrotator.app import console
from radrotator.cli import main
from radrotator.radiograph.image import Radiograph
from radrotator.radiograph.read import read_radiograph
from processes import noting
from test_cli import WEIGHTS, write_bad_files, write_cts, write_radiographs, write_weights

PROGRAM = sys.executable, "-m", "radrotator.cli"
KINDS = dict(png=b"\x89PNG", tif=b"II*\0", tiff=b"II*\0", jpg=b"\xff\xd8", jpeg=b"\xff\xd8", dcm=bytes(128) + b"DICM")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for write in (write_weights, write_radiographs, write_cts, write_bad_files): write(folder)
    radiograph = read_radiograph(folder/"hip.png")
    for name in ("hip.tif", "hip.jpg"): radiograph.write(folder/name)
    return folder


@pytest.fixture
def here(made, monkeypatch, tmp_path):
    "That folder; what is temporary goes to one that is looked at in the end"
    monkeypatch.chdir(made)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield made
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pipe(here, capfdbinary, monkeypatch):
    "A function that sends bytes through a command: its exit status, what it writes, what it says, the error's name"
    names = [""]
    monkeypatch.setattr(console, "format_error", noting(console.format_error, names.append))
    def run(line, data=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        names[1:] = []
        status = main(line.split())
        out, err = capfdbinary.readouterr()
        return status, out, err.decode(), names[-1]
    return run


def pixels_in(data, folder):
    (folder/"piped").write_bytes(data)
    read = read_radiograph(folder/"piped").pixels
    (folder/"piped").unlink()
    return read


@pytest.mark.parametrize("given", ["png", "tif", "jpg", "dcm"])
def test_a_view_is_what_a_file_would_be(given, pipe, here):
    "The kind is that of the content, and the bytes are those of a file"
    sent = (here/f"hip.{given}").read_bytes()
    line = f"--z 9 {' '.join(WEIGHTS)}"
    status, view, said, _ = pipe(f"rotate - -o - {line}", sent)
    assert status == 0 and view.startswith(KINDS[given])
    assert said.splitlines()[-1].startswith("wrote -: x = 0°") and str(tempfile.gettempdir()) not in said
    assert pipe(f"rotate hip.{given} -o {given}_file.{given} {line}")[0] == 0
    assert np.array_equal(pixels_in(view, here), read_radiograph(here/f"{given}_file.{given}").pixels)
    if given != "dcm": assert view == (here/f"{given}_file.{given}").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_that_is_asked_for(kind, pipe, here):
    for option in ("--format", "--kind"):
        status, view, *_ = pipe(f"rotate hip.png -o - {option} {kind} {' '.join(WEIGHTS)}")
        assert status == 0 and view.startswith(KINDS[kind])


def test_other_libraries_read_what_comes_out(pipe, here):
    sent = (here/"hip.png").read_bytes()
    def view(kind): return io.BytesIO(pipe(f"rotate - -o - --z 5 --format {kind} {' '.join(WEIGHTS)}", sent)[1])
    png = np.asarray(Image.open(view("png"))).astype(int)
    assert np.array_equal(tifffile.imread(view("tif")), png)
    ds = pydicom.dcmread(view("dcm"))
    assert np.array_equal(ds.pixel_array, png) and ds.SyntheticData == "YES"


def test_one_stream_and_one_file(pipe, here):
    sent = (here/"hip.dcm").read_bytes()
    status, out, said, _ = pipe(f"rotate - -o alone.png --json {' '.join(WEIGHTS)}", sent)
    assert status == 0 and b'"input": "-"' in out and b'"out": "alone.png"' in out and tempfile.gettempdir() not in said
    status, out, _, _ = pipe(f"sweep - -o alone.gif --frames 2 --json {' '.join(WEIGHTS)}", sent)
    assert status == 0 and b'"input": "-"' in out and (here/"alone.gif").exists()
    status, view, _, _ = pipe(f"rotate - -o - --keep PatientID {' '.join(WEIGHTS)}", sent)
    assert status == 0 and pydicom.dcmread(io.BytesIO(view)).PatientID == "SYNTHETIC"


REFUSED = {  # what is typed: the error's name
    "rotate - -o -": "UNREADABLE",                              # nothing comes
    "rotate - -o - --json": "JSON",
    "rotate hip.png -o - --json": "JSON",
    "rotate hip.png hip.tif -o -": "ONE_NAME",
    "rotate other -o -": "ONE_NAME",
    "rotate - hip.png -o turned": "STDIN",
    "rotate - -o turned": "STDIN",
    "rotate - -o hip.png": "EXISTS",
    "rotate - -o turned.bmp": "KIND",
    "rotate gone.png -o -": "NO_FILE",
    "rotate series -o -": "ONE_NAME",
    "rotate body.nii.gz -o -": "NOT_A_RADIOGRAPH",
    "rotate hip.png -o - --keep PatientID": "NOT_DICOM",
    "rotate - -o - --z 16": "ANGLE",
    "rotate - -o - --weights gone": "*",
    "sweep hip.png -o -": "STDOUT",
    "sweep - -o -": "STDOUT",
    "sweep - -o films --kind gif": "STDIN",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line, pipe, here):
    before = sorted(here.rglob("*"))
    status, out, said, name = pipe(line)
    assert (status, out, said.count("\n")) == (2, b"", 1) and tempfile.gettempdir() not in said
    assert REFUSED[line] in ("*", name)
    assert sorted(here.rglob("*")) == before


def test_what_is_no_radiograph(pipe, here):
    for name in ("letter.dcm", "short.png", "series/slice.dcm", "body.nii.gz"):
        status, out, said, _ = pipe(f"rotate - -o - {' '.join(WEIGHTS)}", (here/name).read_bytes())
        assert (status, out) == (2, b"") and said.startswith("radrotator: cannot read -: ")


def test_a_warning_says_what_was_typed(pipe, here, tmp_path):
    Radiograph(np.random.default_rng(0).random((64, 64)), source="noise").write(tmp_path/"a.dcm")  # bears the mark
    sent = (tmp_path/"a.dcm").read_bytes()
    (tmp_path/"a.dcm").unlink()
    status, view, said, _ = pipe(f"rotate - -o - {' '.join(WEIGHTS)}", sent)
    assert status == 0 and said.startswith("radrotator: -: it is a synthetic picture")


def test_more_than_any_radiograph(pipe, here, monkeypatch):
    monkeypatch.setattr("radrotator.dicom.MAX_BYTES", 5000)
    assert pipe("rotate - -o -", bytes(5001))[::3] == (2, "TOO_LARGE")


def test_a_terminal_is_no_file(here):
    ours, theirs = pty.openpty()
    for line, streams in {"rotate - -o new.png": dict(stdin=theirs), "rotate hip.png -o -": dict(stdout=theirs)}.items():
        done = subprocess.run([*PROGRAM, *line.split()], stderr=subprocess.PIPE, text=True, **streams)
        assert done.returncode == 2 and "terminal" in done.stderr and not (here/"new.png").exists()
    os.set_blocking(ours, False)
    with pytest.raises(BlockingIOError): os.read(ours, 1)  # nothing was written onto it
    os.close(ours); os.close(theirs)


def test_nobody_listens(here):
    words = [*PROGRAM, "rotate", "-", "-o", "-", *WEIGHTS]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, input=(here/"hip.png").read_bytes(), stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and b"Traceback" not in done.stderr


@pytest.mark.parametrize("line", [
    "rotate {} -o new.png", "rotate hip.png -o {}", "sweep {} -o new.gif", "drr {} -o new.png", "ingest {} -o new",
    "evaluate --cts {} -o new", "rotate hip.png -o new.png --weights {}",
])
@pytest.mark.parametrize("address", ["https://example.org/a/hip.png", "http://example.org/hip.png", "s3://bucket/hip"])
def test_an_address_keeps_its_slashes(line, address, pipe, here):
    status, out, said, _ = pipe(line.format(address))
    assert status == 2 and "://" in said and ":/e" not in said and ":/b" not in said
