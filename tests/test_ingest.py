"""An archive as archives are: every fault that real CT files are known to have, one file made for each; kept sides, names and decisions; killed processes."""
import csv, gzip, itertools, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from radrotator import ct as room
from radrotator.core import RadRotatorError, parallel_map
from radrotator.ct import CONDITIONS, CT, REASONS, IngestConfig, Journal, ingest, read_ct, read_report, write_ct
from radrotator.phantom import LABELS, phantom, skeleton

SECRET = dict(PatientName="Secret^Name", PatientID="ID-4711", PatientBirthDate="19440506", StudyDate="20050317", AcquisitionDate="20050317", AccessionNumber="ACC-99")
EASY = IngestConfig(spacing=2, min_slices=20, coverage=False, salt="salt of the tests")


@pytest.fixture
def place(tmp_path):
    "An empty source, and where the results go"
    (tmp_path/"src").mkdir()
    return tmp_path


def body(shape=(30, 24, 40), spacing=(1.5, 1.5, 1.0)):
    "A body that has a left and a right: bone on the right, a ball on the left, in front and above"
    hu = np.full(shape, -1000.0, np.float32)
    hu[4:-4, 3:-3] = 40
    hu[-10:-6, 6:12, 4:-4] = 900
    hu[6:10, 15:19, -10:-6] = 300
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -60, 20, -700
    return CT(hu, affine)


BODY = body()


def slices(folder, ct=BODY, uid=None, feet=False, shear=0.0, drop=(), repeat=(), each=lambda k, ds: None, **header):
    "An axial series; `each` spoils slices"
    folder.mkdir(parents=True, exist_ok=True)
    uid, far = uid or pydicom.uid.generate_uid(), ct.affine[:3, :3] @ (np.array(ct.shape) - 1) + ct.affine[:3, 3]
    for k in (k for k in range(ct.shape[2]) if k not in drop for _ in range(1 + (k in repeat))):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        ds.SeriesInstanceUID, ds.Modality, ds.ImageType, ds.InstanceNumber = uid, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], (7 * k) % ct.shape[2]
        ds.ImageOrientationPatient = [-1.0 if feet else 1.0, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-ct.affine[0, 3] if feet else -far[0], -far[1] + shear * k * ct.spacing[2], ct.affine[2, 3] + k * ct.spacing[2]]
        ds.PixelSpacing, ds.SliceThickness = [*ct.spacing[[1, 0]]], 5
        ds.RescaleSlope, ds.RescaleIntercept = 1 + k % 2, -1024 - k
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, "MONOCHROME2", 0, 16, 16, 15
        stored = np.rint((ct.hu[::1 if feet else -1, ::-1, k].T + 1024 + k) / (1 + k % 2)).astype("<u2")
        ds.Rows, ds.Columns, ds.PixelData = *stored.shape, stored.tobytes()
        for key, value in {**SECRET, **header}.items(): setattr(ds, key, value)
        each(k, ds)
        ds.save_as(folder/f"IM{len(list(folder.iterdir())):04d}", enforce_file_format=True)
    return folder


def one_file(path, ct=BODY, order=None, **macros):
    "An enhanced CT from the slices of a series; None removes a macro from every frame"
    files = [pydicom.dcmread(p) for p in sorted(slices(path.parent/"parts", ct).iterdir())]
    shutil.rmtree(path.parent/"parts")
    files = [files[k] for k in (order if order is not None else np.random.default_rng(0).permutation(len(files)))]
    ds, item = files[0].copy(), lambda **fields: pydicom.Sequence([dataset(**fields)])
    def dataset(**fields):
        d = pydicom.Dataset()
        for key, value in fields.items(): setattr(d, key, value)
        return d
    def frame(f):
        place, turn = item(ImagePositionPatient=f.ImagePositionPatient), item(ImageOrientationPatient=f.ImageOrientationPatient)
        found = dict(PlanePositionSequence=place, PlaneOrientationSequence=turn, PixelValueTransformationSequence=item(RescaleSlope=f.RescaleSlope, RescaleIntercept=f.RescaleIntercept))
        return dataset(**{k: v for k, v in (found | macros).items() if v is not None})
    ds.PerFrameFunctionalGroupsSequence = pydicom.Sequence([frame(f) for f in files])
    ds.SharedFunctionalGroupsSequence = item(PixelMeasuresSequence=item(PixelSpacing=ds.PixelSpacing, SliceThickness=1))
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"): delattr(ds, key)
    ds.NumberOfFrames, ds.PixelData = len(files), b"".join(f.PixelData for f in files)
    ds.save_as(path)


def nifti(path, ct=BODY, sform=1, qform=1, hu=None, **fields):
    "A NIfTI file with some header fields spoilt"
    image = nib.Nifti1Image((ct.hu if hu is None else hu).astype(np.int16), ct.affine)
    image.set_sform(ct.affine if sform else None, sform), image.set_qform(ct.affine if qform else None, qform)
    for key, value in fields.items(): image.header[key] = value
    data = image.to_bytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def run(place, config=EASY, **options):
    "Ingest, and the rows by the name of their source"
    rows = ingest([place/"src"], place/"out", place/"report.csv", config, workers=0, **options)
    assert all(set(r) == set(room.COLUMNS) for r in rows) and "FAILED" not in {r["reason"] for r in rows}
    return {Path(r["source"]).name: r for r in rows}


def kept(place, row): return read_ct(place/"out"/f"{row['name']}.nii.gz")


def right_side(ct):
    "Bone lies on the patient's right, the ball on the left, in front and above"
    at = lambda low, high: ct.affine[:3, :3] @ np.argwhere((ct.hu > low) & (ct.hu < high)).mean(0) + ct.affine[:3, 3] - ct.centre
    bone, ball = at(600, 4000), at(200, 330)
    return bone[0] > 5 and ball[0] < 0 and ball[1] > 0 and ball[2] > 0


# -- left and right, through every reader --

READERS = dict(
    head_first=lambda src: slices(src/"s"), feet_first=lambda src: slices(src/"s", feet=True), enhanced=lambda src: one_file(src/"s"),
    nifti=lambda src: nifti(src/"s.nii.gz"), no_name=lambda src: nifti(src/"s"), packed_without_saying=lambda src: nifti(src/"s.nii.gz").rename(src/"s.dat"))


@pytest.mark.parametrize("reader", READERS)
def test_left_and_right_by_reader(place, reader):
    READERS[reader](place/"src")
    row, = run(place).values()
    ct = kept(place, row)
    assert row["status"] == "accepted" and row["orientation"] == "axial" and int(row["slices"]) == 40 and float(row["thickness"]) == 1
    assert np.allclose(ct.spacing, 2) and np.allclose(ct.centre, BODY.centre, atol=1e-3) and right_side(ct)
    assert np.abs(ct.hu - BODY.resample(2).hu).max() <= 2  # stored with slopes of 1 and 2


def test_left_and_right_in_all_orders_of_nifti(place):
    for n, (order, flips) in enumerate(itertools.product(itertools.permutations(range(3)), itertools.product([1, -1], repeat=3))):
        turn = np.array(list(zip(order, flips)))
        image = nib.Nifti1Image(nib.orientations.apply_orientation(BODY.hu, turn), BODY.affine @ nib.orientations.inv_ornt_aff(turn, BODY.shape))
        nib.save(image, place/"src"/f"{n}.nii")
    rows = run(place)
    assert len(rows) == 48 and {(r["status"], r["orientation"], r["slices"]) for r in rows.values()} == {("accepted", "axial", "40")}
    assert all(right_side(kept(place, r)) for r in rows.values())


# -- what real files do --

def spoil(which, **fields):
    "Change header fields of some slices"
    return lambda k, ds: [setattr(ds, key, value(ds) if callable(value) else value) for key, value in fields.items() if k in which]


def localizer(src):
    slices(src/"s", uid="1.2.3")
    slices(src/"s", body((30, 24, 2)), uid="1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


def silent_localizer(src):
    slices(src/"s", uid="1.2.3")
    slices(src/"s", body((50, 60, 1)), uid="1.2.3", ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


def spread(src):
    slices(src/"a", uid="1.2.3", drop=range(20))
    slices(src/"b"/"c", uid="1.2.3", drop=range(20, 40))
    shutil.copytree(src/"b", src/"copy of b")


def sagittal(src):
    ct = BODY
    where = dict(ImageOrientationPatient=[0, 1, 0, 0, 0, -1], PixelSpacing=[1, 1.5], Rows=40, Columns=24)
    def turned(k, ds):
        ds.ImagePositionPatient = [-(ct.affine[0, 3] + 1.5 * k), -(ct.affine[1, 3] + 1.5 * 23), ct.affine[2, 3] + 39]
        ds.PixelData = np.rint((ct.hu[min(k, 29), ::-1, ::-1].T + 1024 + k) / (1 + k % 2)).astype("<u2").tobytes()
    slices(src/"s", body((30, 24, 30)), each=turned, **where)


def two_forms(src):
    image = nib.load(nifti(src/"s.nii"))
    image.set_qform(BODY.affine @ np.diag([-1, 1, 1, 1]), 1)
    data = image.to_bytes()
    (src/"s.nii").write_bytes(data)


def loops(src):
    slices(src/"s")
    (src/"s"/"again").symlink_to(src), (src/"ring").symlink_to(src/"ring"), os.mkfifo(src/"pipe.dcm"), (src.parent/"outside").mkdir()
    nifti(src.parent/"outside"/"o.nii"), (src/"way out").symlink_to(src.parent/"outside"), (src/"o.nii").symlink_to(src.parent/"outside"/"o.nii")


def one_cut(src):
    path = sorted(slices(src/"s").iterdir())[7]
    path.write_bytes(path.read_bytes()[:-100])


def one_blank(src):
    path = sorted(slices(src/"s").iterdir())[7]
    path.unlink(), (src/"s"/"IM0007.dcm").write_bytes(b"\0" * 500)


def reformatted(src):
    slices(src/"s", uid="1.2.3")
    slices(src/"s", body((30, 40, 24)), uid="1.2.3", ImageOrientationPatient=[1, 0, 0, 0, 0, -1], each=lambda k, ds: setattr(ds, "ImagePositionPatient", [0, float(k), 0]))


FILES = {  # what lies there, and the reasons that it gets, sorted; "" is accepted
    "localizer of the same series": (localizer, [""]),
    "localizer that does not say so": (silent_localizer, [""]),
    "localizers only": (lambda s: slices(s/"s", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), ["LOCALIZER"]),
    "no place": (lambda s: slices(s/"s", ImagePositionPatient=None), ["LOCALIZER"]),
    "missing": (lambda s: slices(s/"s", drop=[9, 10]), ["MISSING_SLICES"]),
    "duplicate": (lambda s: slices(s/"s", repeat=[9]), ["DUPLICATE_SLICES"]),
    "two phases": (lambda s: (slices(s/"s", uid="1.2.3"), slices(s/"s", uid="1.2.3")), ["DUPLICATE_SLICES"]),
    "uneven": (lambda s: slices(s/"s", each=spoil(range(20, 40), ImagePositionPatient=lambda ds: [*ds.ImagePositionPatient[:2], ds.ImagePositionPatient[2] + 0.3])), ["UNEVEN_SLICES"]),
    "tilt": (lambda s: slices(s/"s", shear=np.tan(np.radians(12))), ["GANTRY_TILT"]),
    "sheared": (lambda s: nifti(s/"s.nii", CT(BODY.hu, BODY.affine @ np.array([[1, 0, 0, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))), ["GANTRY_TILT"]),
    "crooked cosines": (lambda s: slices(s/"s", ImageOrientationPatient=[1, 0.02, 0, 0.02, 1, 0]), ["BAD_GEOMETRY"]),
    "nan": (lambda s: slices(s/"s", each=spoil([5], ImagePositionPatient=[0, 0, float("nan")])), ["BAD_GEOMETRY"]),
    "two numbers": (lambda s: slices(s/"s", each=spoil([5], ImagePositionPatient=[0, 4])), ["UNREADABLE"]),
    "sagittal": (sagittal, ["NOT_AXIAL"]),
    "sagittal NIfTI": (lambda s: nifti(s/"s.nii", body((40, 24, 30), (1.0, 1.5, 1.5))), ["NOT_AXIAL"]),
    "oblique": (lambda s: slices(s/"s", ImageOrientationPatient=[1, 0, 0, 0, np.cos(0.3), np.sin(0.3)], each=lambda k, ds: setattr(ds, "ImagePositionPatient", [0, -k * np.sin(0.3), k * np.cos(0.3)])), ["NOT_AXIAL"]),
    "two series in a folder": (lambda s: (slices(s/"s"), slices(s/"s", PatientID="other")), ["", ""]),
    "two patients, one series UID": (lambda s: (slices(s/"s", uid="1.2.3"), slices(s/"s", uid="1.2.3", PatientID="other")), ["", ""]),
    "one series in two folders, one copied": (spread, [""]),
    "a reformat in the series": (reformatted, ["", "NOT_AXIAL"]),
    "enhanced": (lambda s: one_file(s/"s"), [""]),
    "enhanced, a frame missing": (lambda s: one_file(s/"s", order=[k for k in range(40) if k != 11]), ["MISSING_SLICES"]),
    "enhanced without places": (lambda s: one_file(s/"s", PlanePositionSequence=None), ["LOCALIZER"]),
    "frames without a table": (lambda s: slices(s/"s", NumberOfFrames=5), ["MULTI_FRAME"]),
    "few": (lambda s: slices(s/"s", body((30, 24, 10))), ["TOO_FEW_SLICES"]),
    "one slice": (lambda s: slices(s/"s", body((30, 24, 1))), ["TOO_FEW_SLICES"]),
    "thick": (lambda s: slices(s/"s", body(spacing=(1.5, 1.5, 3.0)), SliceThickness=1), ["TOO_THICK"]),
    "thick only in the header": (lambda s: slices(s/"s", SliceThickness=5), [""]),
    "magnetic resonance": (lambda s: slices(s/"s", Modality="MR"), ["NOT_CT"]),
    "one slice cut short": (one_cut, ["UNREADABLE"]),
    "one slice blank": (one_blank, ["MISSING_SLICES", "UNREADABLE"]),
    "no slope": (lambda s: slices(s/"s", RescaleSlope=0), ["NOT_HU"]),
    "huge": (lambda s: slices(s/"s", Rows=60000, Columns=60000), ["TOO_LARGE"]),
    "sform and qform disagree": (two_forms, ["NO_ORIENTATION"]),
    "neither sform nor qform": (lambda s: nifti(s/"s.nii", sform=0, qform=0), ["NO_ORIENTATION"]),
    "4-D": (lambda s: nifti(s/"s.nii", hu=np.stack([BODY.hu] * 2, -1)), ["NOT_A_VOLUME"]),
    "slope nan": (lambda s: nifti(s/"s.nii", scl_slope=np.nan), [""]),
    "outliers": (lambda s: nifti(s/"s.nii", hu=np.where(BODY.hu > 800, 8086, np.where(BODY.hu < -900, -2981, BODY.hu))), [""]),
    "labels": (lambda s: nifti(s/"s.nii", hu=(BODY.hu > 0)), ["NOT_HU"]),
    "labels beside their CT": (lambda s: (nifti(s/"s.nii.gz"), nifti(s/"s_labels.nii.gz", hu=(BODY.hu > 0))), [""]),
    "a copy with another name": (lambda s: (nifti(s/"a.nii"), shutil.copy(s/"a.nii", s/"b.nii")), [""]),
    "cut": (lambda s: (s/"s.nii.gz").write_bytes(nifti(s/"a.nii.gz").read_bytes()[:-50]) and (s/"a.nii.gz").unlink(), ["UNREADABLE"]),
    "text": (lambda s: (s/"s.nii.gz").write_text("Dear colleague"), ["UNREADABLE"]),
    "downloads that failed alike": (lambda s: [(s/f"{i}.nii.gz").write_text("404") for i in range(3)], ["UNREADABLE"] * 3),
    "blank": (lambda s: (s/"s.dcm").touch(), ["UNREADABLE"]),
    "nothing of ours": (lambda s: ((s/"a.txt").write_text("a"), (s/"b").touch(), (s/"c.gz").write_bytes(gzip.compress(b"c")), (s/"d.gz").write_bytes(b"\x1f\x8b\0"), (s/".e.nii").touch(), (s/"DICOMDIR").touch()), []),
    "loops and ways out": (loops, [""]),
}


@pytest.mark.parametrize("name", FILES)
def test_what_real_files_do(place, name):
    make, reasons = FILES[name]
    make(place/"src")
    rows = ingest([place/"src"], place/"out", place/"report.csv", EASY, workers=0)
    assert sorted(r["reason"] for r in rows) == reasons, [r["sentence"] for r in rows]
    for row in rows:
        path = place/"out"/f"{row['name']}.nii.gz"
        assert (row["status"] == "accepted") == (not row["reason"]) == path.exists() and bool(row["sentence"]) == bool(row["reason"])
        assert "\n" not in row["sentence"] and not any(v in row["sentence"] for v in SECRET.values())
        if path.exists():
            hu = read_ct(path).hu
            assert -1024 <= hu.min() and hu.max() <= 3071 and hu.shape[2] == 20


def test_every_reason_is_met():
    met = {reason for _, reasons in FILES.values() for reason in reasons} - {""}
    elsewhere = {"BAD_LABELS", "MIXED_SERIES", "COVERAGE", "BY_HAND", "FAILED", "TOO_SHORT", "NO_FOLD"}  # read_ct's, the tests below, and those of pairs
    assert met | elsewhere == set(REASONS) and not met & elsewhere and set(CONDITIONS) <= set(REASONS)


def test_reasons_of_read_ct(place):
    with pytest.raises(room.Refusal) as two: read_ct(slices(slices(place/"src"/"s")))
    nifti(place/"a.nii"), nifti(place/"a_labels.nii.gz", body((5, 5, 5)))
    with pytest.raises(room.Refusal) as labels: read_ct(place/"a.nii")
    assert two.value.code == "MIXED_SERIES" and labels.value.code == "BAD_LABELS"


# -- resampling and what is written --

@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_resampling_as_simpleitk_does(spacing):
    "Against SimpleITK's linear resampler on the same grid, after its Gaussian of the same width"
    smooth = CT(np.random.default_rng(0).normal(0, 100, (40, 36, 30)).astype(np.float32), BODY.affine @ np.diag([0.6, 0.6, 1.2, 1]))
    ours = smooth.resample(spacing)
    image = sitk.GetImageFromArray(smooth.hu.T)
    image.SetSpacing(smooth.spacing.tolist()), image.SetOrigin(smooth.affine[:3, 3].tolist())
    sigma = np.sqrt(np.maximum(spacing**2 - smooth.spacing**2, 0)) / 2.355
    for axis in np.flatnonzero(sigma):
        kernel = np.exp(-0.5 * (np.arange(-9, 10) * smooth.spacing[axis] / sigma[axis])**2)
        kernel = np.expand_dims(kernel / kernel.sum(), [i for i in range(3) if i != 2 - axis])
        image = sitk.Convolution(sitk.Cast(image, sitk.sitkFloat64), sitk.GetImageFromArray(kernel), boundaryCondition=sitk.ConvolutionImageFilter.ZERO_FLUX_NEUMANN_PAD)
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, [int(n) for n in ours.shape], sitk.Transform(), sitk.sitkLinear, ours.affine[:3, 3].tolist(), [spacing] * 3)).T
    inside = (slice(2, -2),) * 3  # SimpleITK puts zeros beyond the last voxel centre
    assert np.abs(ours.hu - theirs)[inside].max() < 0.5 and ours.hu.std() > 10


def test_nothing_tells_who_it_is(place):
    slices(place/"src"/"Secret Name 1944")
    nifti(place/"src"/"Smith_John_19440506.nii.gz", descrip=b"Secret^Name", aux_file=b"ID-4711", db_name=b"ID-4711", intent_name=b"Secret")
    rows = run(place, IngestConfig(spacing=2, min_slices=20, coverage=False))
    assert {r["status"] for r in rows.values()} == {"accepted"} and len({r["patient"] for r in rows.values()}) == 2
    uids = {pydicom.dcmread(p).SeriesInstanceUID for p in (place/"src"/"Secret Name 1944").iterdir()}
    words = [w.encode() for w in (*SECRET.values(), "Secret", "Smith", "1944", *uids, str(place))]
    assert sorted(p.name for p in (place/"out").iterdir())[-1] == "salt" and len(list((place/"out").iterdir())) == 3
    for path in (place/"out").iterdir():
        assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{12}\.nii\.gz|salt", path.name)
        data = path.read_bytes()
        for text in (data, gzip.decompress(data)[:352] if path.suffix == ".gz" else b""): assert not any(w in text for w in words)
        if path.suffix == ".gz": assert gzip.decompress(data)[148:148 + 80 + 24] == bytes(104)  # descrip, aux_file
    private = (place/"report.csv").read_text() + (place/"report.csv.log").read_text()
    assert not any(w in private for w in ("ID-4711", "2005", *uids))  # paths are told, dates and identifiers are not


def test_the_same_input_gives_the_same_bytes(place):
    slices(place/"src"/"s", uid="1.2.3"), nifti(place/"src"/"n.nii")
    bytes_of = lambda: {p.name: p.read_bytes() for p in (place/"out").iterdir()}
    run(place)
    once = bytes_of()
    shutil.rmtree(place/"out"), (place/"src").rename(place/"moved"), (place/"moved"/"s").rename(place/"moved"/"t")
    ingest([place/"moved"], place/"out", place/"other.csv", EASY, workers=2)
    assert once == bytes_of() and len(once) == 2
    shutil.rmtree(place/"out")
    ingest([place/"moved"], place/"out", place/"third.csv", IngestConfig(spacing=2, min_slices=20, coverage=False), workers=0)
    assert not set(once) & set(bytes_of())  # another salt


def test_era_and_year(place):
    for i in range(8): slices(place/"src"/f"s{i}", body((20, 16, 20)), AcquisitionDate=f"20{i:02}0715", StudyDate="19990101")
    slices(place/"src"/"undated", body((20, 16, 20)), AcquisitionDate="", StudyDate=""), nifti(place/"src"/"n.nii")
    rows = run(place)
    assert [rows[f"s{i}"]["era"] for i in range(8)] == list("11223344") and rows["undated"]["era"] == rows["n.nii"]["era"] == ""
    assert {r["year"] for r in rows.values()} == {""} and "0715" not in (place/"report.csv").read_text()
    again = run(place, room.replace(EASY, years=True))
    assert [again[f"s{i}"]["year"] for i in range(8)] == [f"{2000 + i}" for i in range(8)]
    assert [r["patient"] for r in again.values()].count(again["s0"]["patient"]) == 9  # one PatientID


def test_whose_ct(place):
    for folder, name in (("P1", "ct.nii"), ("P1", "late.nii"), ("P2", "ct.nii")):
        (place/"src"/folder).mkdir(exist_ok=True)
        nifti(place/"src"/folder/name, CT(BODY.hu + np.random.default_rng(len(folder + name) + ord(folder[1])).integers(0, 9), BODY.affine))
    slices(place/"src"/"d", PatientID="P1"), slices(place/"src"/"e", PatientID="P1", IssuerOfPatientID="elsewhere")
    rows = ingest([place/"src"], place/"out", place/"report.csv", room.replace(EASY, patient=r"/(P\d)/"), workers=0)
    assert [len({r["patient"] for r in rows if part in r["source"]}) for part in ("/P1/", "/P2/", "/d", "/e", "")] == [1, 1, 1, 1, 3]


# -- the user's decisions --

def decide(report, decisions):
    "Write decisions into the report, as a user would"
    rows = list(csv.DictReader(report.open()))
    for row in rows: row["decision"] = decisions.get(Path(row["source"]).name, row["decision"])
    with report.open("w") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader(), table.writerows(rows)


def test_decisions_are_honoured_and_kept(place):
    slices(place/"src"/"good"), slices(place/"src"/"thick", body(spacing=(1.5, 1.5, 3.0))), slices(place/"src"/"tilt", shear=0.2), nifti(place/"src"/"bare.nii")
    config = room.replace(EASY, coverage=True)
    assert {k: r["reason"] for k, r in run(place, config).items()} == dict(good="COVERAGE", thick="TOO_THICK", tilt="GANTRY_TILT") | {"bare.nii": "COVERAGE"}
    decide(place/"report.csv", dict(good="accept", thick=" Accept", tilt="accept"))
    rows = run(place, config)
    assert {k: r["reason"] for k, r in rows.items()} == dict(good="", thick="", tilt="GANTRY_TILT") | {"bare.nii": "COVERAGE"}
    assert {k: r["decision"] for k, r in rows.items()} == dict(good="accept", thick="accept", tilt="accept") | {"bare.nii": ""}
    assert rows["good"]["proposal"].startswith("refuse: ")
    decide(place/"report.csv", dict(good="refuse"))
    again = run(place, config)
    assert again["good"]["reason"] == "BY_HAND" and not (place/"out"/f"{again['good']['name']}.nii.gz").exists() and again["thick"]["status"] == "accepted"
    shutil.rmtree(place/"src"/"thick"), shutil.rmtree(place/"src"/"good")  # what was decided stays, also when its source is away
    last = run(place, config)
    assert {k: r["decision"] for k, r in last.items()} == {k: r["decision"] for k, r in again.items()}
    decide(place/"report.csv", dict(tilt="perhaps"))
    with pytest.raises(RadRotatorError, match="neither accept nor refuse"): run(place, config)


def test_another_source_adds_to_the_report(place):
    nifti(place/"src"/"a.nii"), (place/"more").mkdir(), nifti(place/"more"/"b.nii", body((30, 24, 30))), nifti(place/"more"/"c.nii", body((30, 24, 5)))
    run(place)
    rows = ingest([place/"more"], place/"out", place/"report.csv", EASY, workers=0)
    assert [Path(r["source"]).name for r in rows] == ["b.nii", "c.nii", "a.nii"] and len(list((place/"out").glob("*.nii.gz"))) == 2
    (place/"more"/"c.nii").unlink()  # a refused one that is gone is forgotten
    assert len(ingest([place/"more"], place/"out", place/"report.csv", EASY, workers=0)) == 2


def test_refused_before_work(place):
    nifti(place/"src"/"a.nii"), (place/"file").touch(), (place/"fruit.csv").write_text("fruit,price\n"), (place/"bad").mkdir(), (place/"bad"/"salt").touch()
    for args, why in {(place/"none", place/"out", place/"r.csv"): "no such file", (place/"src", place/"file", place/"r.csv"): "this is a file", (place/"src", place/"a"/"b", place/"r.csv"): "does not exist",
                      (place/"src", place/"out", place/"out"/"r.csv"): "outside", (place/"src", place/"out", place/"fruit.csv"): "not a report", (place/"src", place/"bad", place/"r.csv"): "no salt"}.items():
        with pytest.raises(RadRotatorError, match=why): ingest([args[0]], *args[1:], room.replace(EASY, salt=None), workers=0)
    assert (place/"fruit.csv").read_text() == "fruit,price\n"


# -- again, and killed --

def test_only_what_changed_is_done_again(place):
    for i in range(3): nifti(place/"src"/f"{i}.nii", body((30, 24, 30 + i)))
    slices(place/"src"/"s")
    counts = []
    def count(jobs, total):
        counts.append(total)
        return jobs
    rows = run(place, progress=count)
    stamps = lambda: {p.name: p.stat().st_mtime_ns for p in (place/"out").iterdir()}
    before = stamps()
    run(place, progress=count)
    assert stamps() == before
    path = place/"out"/f"{rows['1.nii']['name']}.nii.gz"
    path.write_bytes(path.read_bytes()[:-9])                              # a CT cut short
    run(place, progress=count)
    assert stamps().keys() == before.keys() and [k for k, t in stamps().items() if t != before[k]] == [path.name]
    next((place/"src"/"s").iterdir()).unlink()                            # a slice is gone: fewer, from the end
    assert run(place, progress=count)["s"]["slices"] == "39"
    assert counts == [2, 4, 0, 0, 0, 1, 1, 1]


def test_killed_and_run_again(place):
    "A real process, killed twice without warning: nothing is lost, nothing whole is made twice"
    for i in range(12): nifti(place/"src"/f"{i:02}.nii.gz", CT(np.random.default_rng(i).normal(0, 50, (90, 80, 80)).astype(np.float32) + i, BODY.affine))
    script = ("from radrotator.ct import *\nif __name__ == '__main__':\n"
              f"    ingest(['{place}/src'], '{place}/out', '{place}/report.csv', IngestConfig(min_slices=20, coverage=False, salt='salt of the tests'), workers=2)\n")
    (place/"go.py").write_text(script)
    whole = lambda: {p.name: p.stat().st_mtime_ns for p in (place/"out").glob("[0-9a-f]*.nii.gz")} if (place/"out").exists() else {}
    seen = {}
    for target in (2, 6):
        process, end = subprocess.Popen([sys.executable, place/"go.py"], start_new_session=True), time.monotonic() + 60
        while len(whole()) < target and time.monotonic() < end and process.poll() is None: time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL), process.wait()
        journal = {row["name"] for key, rows in Journal(place/"report.csv.log").values.items() if key.startswith("rows") for row in rows}
        now = whole()
        assert target <= len(now) < 12 and all(now[name] == stamp for name, stamp in seen.items())
        for path in (place/"out").glob("[0-9a-f]*.nii.gz"): read_ct(path)
        seen = {name: stamp for name, stamp in now.items() if name.removesuffix(".nii.gz") in journal}
    assert len(seen) >= 2
    subprocess.run([sys.executable, place/"go.py"], check=True, timeout=60)
    rows = read_report(place/"report.csv")
    assert len(rows) == 12 and {r["status"] for r in rows.values()} == {"accepted"} and len(whole()) == 12 and all(whole()[n] == s for n, s in seen.items())
    assert not [p for p in (place/"out").iterdir() if p.name.startswith(".")]  # what the killed runs left is gone
    first = {p.name: p.read_bytes() for p in (place/"out").glob("*.nii.gz")}
    shutil.rmtree(place/"out")
    ingest([place/"src"], place/"out", place/"once.csv", IngestConfig(min_slices=20, coverage=False, salt="salt of the tests"), workers=0)
    assert first == {p.name: p.read_bytes() for p in (place/"out").glob("*.nii.gz")}


def deadly(number):
    "A worker that dies of one job"
    if number == 5: os.kill(os.getpid(), signal.SIGKILL)
    return -number


def test_a_worker_that_dies_costs_one_job():
    found = list(parallel_map(deadly, list(range(12)), 2))
    assert sorted(found) == sorted((n, None if n == 5 else -n) for n in range(12))


REAL = room.curate


def poisoned(job, out, config):
    "As `curate`, but one CT kills its process"
    if job[0].files[0].endswith("2.nii"): os.kill(os.getpid(), signal.SIGKILL)
    return REAL(job, out, config)


def test_a_killed_worker_is_a_row_and_is_tried_again(place, monkeypatch):
    for i in range(5): nifti(place/"src"/f"{i}.nii", body((30, 24, 30 + i)))
    monkeypatch.setattr(room, "curate", poisoned)
    rows = {Path(r["source"]).name: r["reason"] for r in ingest([place/"src"], place/"out", place/"report.csv", EASY, workers=2)}
    assert rows == {f"{i}.nii": "FAILED" if i == 2 else "" for i in range(5)}
    monkeypatch.undo()
    assert {r["reason"] for r in run(place).values()} == {""}


# -- coverage --

@pytest.mark.parametrize("seed", range(3))
def test_proposals_for_halves_and_parts(seed):
    "Left and right halves, above and below: refused; whole: accepted"
    ct = phantom(seed, 4.0, soft=seed != 1)
    femora = (ct.labels == LABELS["femur_left"]).any()
    n = ct.shape[0] // 2
    def proposal(x=slice(None), z=slice(None)): return room.coverage(room.bone_profile(CT(ct.hu[x, :, z], ct.affine)))["proposal"]
    assert (proposal() == "accept") == femora
    for part in (dict(x=slice(0, n)), dict(x=slice(n, None)), dict(z=slice(70, None)), dict(z=slice(0, 60)), dict(z=slice(0, 20))): assert proposal(**part).startswith("refuse"), part


def test_proposals_at_random_levels():
    "Sixteen phantoms cut at random levels around crest and trochanter"
    right, whole = 0, 0
    for seed in range(100, 116):
        random, ct = np.random.default_rng(seed), phantom(seed, 4.0, soft=True)
        z = ct.affine[2, 3] + 4 * np.arange(ct.shape[2])
        crest = z[np.isin(ct.labels, [LABELS["hip_left"], LABELS["hip_right"]]).any((0, 1))].max()
        lesser = min(skeleton(seed).bones[f"femur_{s}"][-1].triangles[..., 2].mean() for s in ("left", "right"))
        low, high = lesser + random.uniform(-90, 40), crest + random.uniform(-40, 90)
        part = CT(ct.hu[:, :, slice(*np.searchsorted(z, [low, high]))], ct.affine)
        truth = low <= lesser and high >= crest
        right, whole = right + (truth == (room.coverage(room.bone_profile(part))["proposal"] == "accept")), whole + truth
    assert right >= 14 and 3 < whole < 13


def test_another_name_for_the_patient_replaces_the_old_copy(place):
    (place/"src"/"anna").mkdir(parents=True)
    write_ct(BODY, place/"src"/"anna"/"ct.nii.gz")
    first, = ingest([place/"src"], place/"out", place/"r.csv", EASY, workers=0)
    second, = ingest([place/"src"], place/"out", place/"r.csv", room.replace(EASY, patient="/src/([^/]+)/"), workers=0)
    assert first["status"] == second["status"] == "accepted" and first["name"].split("-")[0] != second["name"].split("-")[0]
    assert [p.name for p in (place/"out").glob("*.nii.gz")] == [f"{second['name']}.nii.gz"]


def test_the_date_is_that_of_the_scan_and_not_of_its_export(place):
    slices(place/"src"/"s", StudyDate="20050601", SeriesDate="20050601", AcquisitionDate="", ContentDate="20190820")
    row, = ingest([place/"src"], place/"out", place/"r.csv", room.replace(EASY, years=True), workers=0)
    assert row["year"] == "2005"


def test_a_report_with_spaces_and_semicolons_is_the_same_report(place):
    slices(place/"src"/"s")
    row, = ingest([place/"src"], place/"out", place/"r.csv", EASY, workers=0)
    header, line = (place/"r.csv").read_text().splitlines()
    cells = dict(zip(header.split(","), next(csv.reader([line])))) | dict(decision=" Refuse ")
    (place/"r.csv").write_text("\ufeff" + " ; ".join(cells) + "\n" + " ; ".join(cells.values()) + "\n", encoding="utf-8")
    again, = ingest([place/"src"], place/"out", place/"r.csv", EASY, workers=0)
    assert (again["name"], again["reason"], again["decision"]) == (row["name"], "BY_HAND", "refuse") and not list((place/"out").glob("*.nii.gz"))


def test_two_ingests_at_once(place):
    from radrotator.core import folder_lock
    slices(place/"src"/"s")
    (place/"out").mkdir()
    with folder_lock(place/"out"), pytest.raises(RadRotatorError, match="another process"): ingest([place/"src"], place/"out", place/"r.csv", EASY, workers=0)
