"""A sweep as one DICOM file, the mark in its frames, and frames of earlier versions."""
import shutil, subprocess

import numpy as np
import pydicom
import pytest
from PIL import Image
from test_sweep import FRAMES, film, interrupt, model_of, moving_picture, names, picture, refused, write

from radrotator.radiograph.read import read_radiograph
from radrotator.rotate.video import read_frame

KEPT = dict(PatientID="ID4711", StudyInstanceUID="1.2.3.4", PatientName="Müller^Änne")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A sweep in DICOM, marked"
    return model_of().write_sweep(picture(75, 60, (0.2, 0.25)), tmp_path_factory.mktemp("made")/"turn.dcm", "y", FRAMES, bounce=True)


def test_frames_are_the_views(tmp_path):
    ds = pydicom.dcmread(model_of().write_sweep(picture(75, 60, (0.2, 0.25)), tmp_path/"turn.dcm", "y", FRAMES, mark=False))
    views = np.stack([view.pixels for view in model_of().sweep(picture(75, 60, (0.2, 0.25)), "y", np.linspace(-15, 15, FRAMES))])
    assert np.array_equal(ds.pixel_array, np.rint(views*65535)) and ds.BurnedInAnnotation == "NO"
    assert list(ds.PixelSpacing) == [0.2, 0.25] and names(tmp_path) == ["turn.dcm"]
    assert np.allclose(read_radiograph(tmp_path/"turn.dcm", frame=3).spacing, (0.2, 0.25))


def test_what_it_says_of_itself(made):
    ds = pydicom.dcmread(made)
    assert ds.SOPClassUID == pydicom.uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    assert (ds.SyntheticData, ds.ContentQualification, ds.BurnedInAnnotation, list(ds.ImageType)) == ("YES", "RESEARCH", "YES", ["DERIVED", "SECONDARY"])
    assert (ds.NumberOfFrames, ds.RecommendedDisplayFrameRate, ds.PreferredPlaybackSequencing) == (FRAMES, 30, 1) and abs(ds.FrameTime - 100/3) < 1e-6
    assert [ds.FrameLabelVector[i] for i in (0, 5, 10)] == ["y = -15.0°", "y = 0.0°", "y = +15.0°"]
    assert "turned about y from -15° to 15°" in ds.DerivationDescription and b"Doe" not in made.read_bytes()
    assert all(value.is_valid for value in (ds.SOPInstanceUID, ds.StudyInstanceUID, ds.SeriesInstanceUID)) and ds.PatientID == "SYNTHETIC"


def test_its_patient_only_by_name(tmp_path):
    ds = pydicom.dcmread(write(tmp_path/"turn.dcm", keep=KEPT))
    assert all(ds[name].value == value for name, value in KEPT.items()) and ds.SeriesInstanceUID != ds.StudyInstanceUID
    for asked, code in ((dict(PixelData="1"), "NOT_PATIENT_DATA"), (dict(PatientBirthDate="May"), "BAD_VALUE")):
        with refused(code): write(tmp_path/"other.dcm", keep=asked)
    with refused("NOT_DICOM"): write(tmp_path/"other.mp4", keep=KEPT)
    assert names(tmp_path) == ["turn.dcm"]


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian: dicom3tools) is not here")
@pytest.mark.parametrize("asked", [{}, dict(mark=True, bounce=True), dict(label=True), dict(keep=KEPT)], ids=str)
def test_dciodvfy(asked, tmp_path):
    said = subprocess.run(["dciodvfy", write(tmp_path/"turn.dcm", **asked)], capture_output=True, text=True, errors="replace").stderr.splitlines()
    assert any("MultiframeGrayscaleWordSC" in line.replace(" ", "") for line in said), said
    assert not [line for line in said if line.startswith("Error") and "(0x0008,0x001c)" not in line]   # SyntheticData, which Debian's does not know


def test_interrupted_and_resumed(tmp_path):
    whole = pydicom.dcmread(write(tmp_path/"whole.dcm")).pixel_array
    interrupt(tmp_path/"turn.dcm", after=5)
    assert names(tmp_path) == [".turn.dcm.frames", "whole.dcm"]
    assert np.array_equal(pydicom.dcmread(write(tmp_path/"turn.dcm", resume=True)).pixel_array, whole) and names(tmp_path) == ["turn.dcm", "whole.dcm"]


def test_too_large_is_refused_at_once(tmp_path):
    with refused("TOO_LARGE"): model_of().write_sweep(np.random.default_rng(0).random((1500, 1500), np.float32), tmp_path/"turn.dcm", frames=1000)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [".mp4", ".gif", ".dcm", ""])
def test_every_frame_bears_the_mark_in_one_place(kind, tmp_path):
    def shown(name, **asked):
        path = write(tmp_path/f"{name}{kind}", **asked)
        if kind == ".dcm": return pydicom.dcmread(path).pixel_array/257
        if kind == "": return np.stack([read_frame(frame) for frame in sorted(path.glob("*.png"))]).astype(float)
        return (film(path)[0] if kind == ".mp4" else moving_picture(path)[0]).astype(float)
    apart = np.abs(shown("marked", mark=True) - shown("bare")) > 25
    assert apart.any(axis=(1, 2)).all()
    rows, columns = np.nonzero(apart.any(axis=0))
    assert rows.min() > 50 and 1 + np.ptp(rows) <= 20                                     # along the lower edge of 75
    assert np.mean(apart[1] == apart[-1]) > 0.95


def test_sixteen_bit_frames_of_earlier_versions_go_on(tmp_path):
    "An interrupted film of a version that kept its frames with 16 bits"
    whole = moving_picture(write(tmp_path/"whole.gif"))[0]
    interrupt(tmp_path/"turn.gif", after=4)
    for path in (tmp_path/".turn.gif.frames").glob("[0-9]*.png"):
        with Image.open(path) as image: levels = np.asarray(image)
        assert levels.dtype == np.uint8
        Image.fromarray(257*levels.astype(np.uint16)).save(path)
    assert np.array_equal(moving_picture(write(tmp_path/"turn.gif", resume=True))[0], whole)
