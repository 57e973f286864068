"""An archive as archives are: every fault that real CT files are known to have, one file made for each;
kept sides, names and decisions; killed processes."""
import csv, gzip, os, re, shutil, signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from helpers import PATIENT, body, write_enhanced, write_nifti_file, write_series
from processes import serving, wait_until
from radrotator.core import error_code
from radrotator.files import folder_lock
from radrotator.processes import parallel_map
import radrotator.ct.ingest as room
from radrotator.ct.archive import Journal
from radrotator.ct.coverage import bone_profile, judge_coverage
from radrotator.ct.curate import IngestConfig, curate_series
from radrotator.ct.ingest import ingest
from radrotator.ct.nifti import write_ct
from radrotator.ct.read import read_ct
from radrotator.ct.report import REPORT_COLUMNS, read_report
from radrotator.ct.volume import CT, REASONS
from radrotator.phantom.phantom import phantom
from radrotator.phantom.skeleton import make_skeleton
from radrotator.phantom.grid import LABELS

EASY = IngestConfig(spacing=2, min_slices=20, coverage=False, salt="salt of the tests")
BODY = body()


@pytest.fixture
def place(tmp_path):
    "An empty source, and where the results go"
    (tmp_path/"src").mkdir()
    return tmp_path


def slices(folder, ct=BODY, **options): return write_series(folder, ct, **options)


def nifti(path, ct=BODY, **options): return write_nifti_file(path, ct, **options)


def source_name(row): return Path(row["source"]).name


def run(place, config=EASY, source="src", report="report.csv", **options):
    "Ingest, and the rows by the name of their source"
    rows = ingest([place/source], place/"out", place/report, config, workers=0, **options)
    assert all(set(row) == set(REPORT_COLUMNS) for row in rows)
    assert "FAILED" not in {row["reason"] for row in rows}
    return {source_name(row): row for row in rows}


def kept(place, row): return read_ct(place/"out"/f"{row['name']}.nii.gz")


def right_side(ct):
    "Bone lies on the patient's right, the ball on the left, in front and above"
    def at(low, high):
        middle = np.argwhere((ct.hu > low) & (ct.hu < high)).mean(0)
        return ct.affine[:3, :3] @ middle + ct.affine[:3, 3] - ct.centre
    bone, ball = at(600, 4000), at(200, 330)
    return bone[0] > 5 and ball[0] < 0 and ball[1] > 0 and ball[2] > 0


# ---- left and right, through every reader ----------------------------------------------------------------------------

def nifti_in_another_order(path, order=((2, -1), (0, 1), (1, -1))):
    "The same body, its axes stored in another order and direction (all 48 are in the notebook of NIfTI files)"
    stored = nib.orientations.apply_orientation(BODY.hu, order)
    return nifti(path, CT(stored, BODY.affine @ nib.orientations.inv_ornt_aff(order, BODY.shape)))


READERS = dict(
    head_first=lambda src: slices(src/"s"),
    feet_first=lambda src: slices(src/"s", feet=True),
    enhanced=lambda src: write_enhanced(src/"s", BODY),
    nifti=lambda src: nifti(src/"s.nii.gz"),
    no_name=lambda src: nifti(src/"s"),
    nifti_in_another_order=lambda src: nifti_in_another_order(src/"s.nii"),
    packed_without_saying=lambda src: nifti(src/"s.nii.gz").rename(src/"s.dat"),
)


@pytest.mark.parametrize("reader", READERS)
def test_left_and_right_by_reader(place, reader):
    READERS[reader](place/"src")
    row, = run(place).values()
    ct = kept(place, row)
    assert (row["status"], row["orientation"]) == ("accepted", "axial")
    assert (int(row["slices"]), float(row["thickness"])) == (40, 1)
    assert np.allclose(ct.spacing, 2) and np.allclose(ct.centre, BODY.centre, atol=1e-3) and right_side(ct)
    assert np.abs(ct.hu - BODY.resample(2).hu).max() <= 2  # stored with slopes of 1 and 2


# ---- what real files do ----------------------------------------------------------------------------------------------

SIDEWAYS = [1, 0, 0, 0, 0, -1]  # row and column of a coronal picture
LOCALIZER = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def change(which, **fields):
    "Change header fields of some slices"
    def spoil(k, ds):
        if k not in which: return
        for name, value in fields.items(): setattr(ds, name, value(ds) if callable(value) else value)
    return spoil


def localizer(src):
    slices(src/"s", series="1.2.3")
    header = dict(ImageType=LOCALIZER, ImageOrientationPatient=SIDEWAYS)
    slices(src/"s", body((30, 24, 12)), series="1.2.3", drop=range(2, 12), **header)


def silent_localizer(src):
    slices(src/"s", series="1.2.3")
    slices(src/"s", body((50, 60, 12)), series="1.2.3", drop=range(1, 12), ImageOrientationPatient=SIDEWAYS)


def spread(src):
    slices(src/"a", series="1.2.3", drop=range(20))
    slices(src/"b"/"c", series="1.2.3", drop=range(20, 40))
    shutil.copytree(src/"b", src/"copy of b")


def two_phases(src):
    for _ in range(2): slices(src/"s", series="1.2.3")


def uneven(src):
    def higher(ds): return [*ds.ImagePositionPatient[:2], ds.ImagePositionPatient[2] + 0.3]
    slices(src/"s", spoil=change(range(20, 40), ImagePositionPatient=higher))


def misplaced(src, position):
    slices(src/"s", spoil=change([5], ImagePositionPatient=position))


def sheared(src):
    shear = np.eye(4)
    shear[1, 2] = 0.2
    nifti(src/"s.nii", CT(BODY.hu, BODY.affine @ shear))


def oblique(src):
    def turn(k, ds): ds.ImagePositionPatient = [0, -k*np.sin(0.3), k*np.cos(0.3)]
    slices(src/"s", spoil=turn, ImageOrientationPatient=[1, 0, 0, 0, np.cos(0.3), np.sin(0.3)])


def sagittal(src):
    def turn(k, ds):
        low = BODY.affine[:3, 3]
        ds.ImagePositionPatient = [-(low[0] + 1.5*k), -(low[1] + 1.5*23), low[2] + 39]
        ds.PixelData = np.rint((BODY.hu[k, ::-1, ::-1].T + 1024 + k)/(1 + k % 2)).astype("<u2").tobytes()
    shape = dict(PixelSpacing=[1, 1.5], Rows=40, Columns=24)
    slices(src/"s", body((30, 24, 30)), spoil=turn, ImageOrientationPatient=[0, 1, 0, 0, 0, -1], **shape)


def reformatted(src):
    slices(src/"s", series="1.2.3")
    def turn(k, ds): ds.ImagePositionPatient = [0, float(k), 0]
    slices(src/"s", body((30, 40, 24)), series="1.2.3", spoil=turn, ImageOrientationPatient=SIDEWAYS)


def two_patients(src):
    slices(src/"s", series="1.2.3")
    slices(src/"s", series="1.2.3", PatientID="other")


def two_forms(src):
    image = nib.load(nifti(src/"s.nii"))
    image.set_qform(BODY.affine @ np.diag([-1, 1, 1, 1]), 1)
    data = image.to_bytes()
    (src/"s.nii").write_bytes(data)


def loops(src):
    slices(src/"s")
    (src/"s"/"again").symlink_to(src)
    (src/"ring").symlink_to(src/"ring")
    os.mkfifo(src/"pipe.dcm")
    (src.parent/"outside").mkdir()
    nifti(src.parent/"outside"/"o.nii")
    (src/"way out").symlink_to(src.parent/"outside")
    (src/"o.nii").symlink_to(src.parent/"outside"/"o.nii")


def one_cut(src):
    path = slices(src/"s")/"IM0007"
    path.write_bytes(path.read_bytes()[:-100])


def one_blank(src):
    path = slices(src/"s")/"IM0007"
    path.unlink()
    path.with_suffix(".dcm").write_bytes(b"\0"*500)


def cut_nifti(src):
    (src/"s.nii.gz").write_bytes(nifti(src/"a.nii.gz").read_bytes()[:-50])
    (src/"a.nii.gz").unlink()


def outliers(src):
    hu = np.where(BODY.hu > 800, 8086, BODY.hu)
    nifti(src/"s.nii", hu=np.where(hu < -900, -2981, hu))


def labels_beside(src):
    nifti(src/"s.nii.gz")
    nifti(src/"s_labels.nii.gz", hu=(BODY.hu > 0))


def nothing_of_ours(src):
    for name in ("b", ".e.nii", "DICOMDIR"): (src/name).touch()
    (src/"a.txt").write_text("a")
    (src/"c.gz").write_bytes(gzip.compress(b"c"))
    (src/"d.gz").write_bytes(b"\x1f\x8b\0")


def failed_downloads(src):
    for i in range(3): (src/f"{i}.nii.gz").write_text("404")


ALL_BUT_ONE = [k for k in range(40) if k != 11]
FILES = {  # what lies there, and the reasons that it gets, sorted; "" is accepted
    "localizer of the same series": (localizer, [""]),
    "localizer that does not say so": (silent_localizer, [""]),
    "localizers only": (lambda src: slices(src/"s", ImageType=LOCALIZER), ["LOCALIZER"]),
    "no place": (lambda src: slices(src/"s", ImagePositionPatient=None), ["LOCALIZER"]),
    "missing": (lambda src: slices(src/"s", drop=[9, 10]), ["MISSING_SLICES"]),
    "duplicate": (lambda src: slices(src/"s", repeat=[9]), ["DUPLICATE_SLICES"]),
    "two phases": (two_phases, ["DUPLICATE_SLICES"]),
    "uneven": (uneven, ["UNEVEN_SLICES"]),
    "tilt": (lambda src: slices(src/"s", shear=np.tan(np.radians(12))), ["GANTRY_TILT"]),
    "sheared": (sheared, ["GANTRY_TILT"]),
    "crooked": (lambda src: slices(src/"s", ImageOrientationPatient=[1, 0.02, 0, 0.02, 1, 0]), ["BAD_GEOMETRY"]),
    "nan": (lambda src: misplaced(src, [0, 0, float("nan")]), ["BAD_GEOMETRY"]),
    "two numbers": (lambda src: misplaced(src, [0, 4]), ["BAD_GEOMETRY"]),
    "sagittal": (sagittal, ["NOT_AXIAL"]),
    "sagittal NIfTI": (lambda src: nifti(src/"s.nii", body((40, 24, 30), (1.0, 1.5, 1.5))), ["NOT_AXIAL"]),
    "oblique": (oblique, ["NOT_AXIAL"]),
    "two series in a folder": (lambda src: slices(slices(src/"s"), PatientID="other"), ["", ""]),
    "two patients, one series UID": (two_patients, ["", ""]),
    "one series in two folders, one copied": (spread, [""]),
    "a reformat in the series": (reformatted, ["", "NOT_AXIAL"]),
    "enhanced": (lambda src: write_enhanced(src/"s", BODY), [""]),
    "enhanced, a frame missing": (lambda src: write_enhanced(src/"s", BODY, ALL_BUT_ONE), ["MISSING_SLICES"]),
    "enhanced without places": (lambda src: write_enhanced(src/"s", BODY, PlanePositionSequence=None), ["LOCALIZER"]),
    "frames without a table": (lambda src: slices(src/"s", NumberOfFrames=5), ["MULTI_FRAME"]),
    "few": (lambda src: slices(src/"s", drop=range(10, 40)), ["TOO_FEW_SLICES"]),
    "one slice": (lambda src: slices(src/"s", drop=range(1, 40)), ["TOO_FEW_SLICES"]),
    "thick": (lambda src: slices(src/"s", body(spacing=(1.5, 1.5, 3.0)), SliceThickness=1), ["TOO_THICK"]),
    "thick only in the header": (lambda src: slices(src/"s", SliceThickness=5), [""]),
    "magnetic resonance": (lambda src: slices(src/"s", Modality="MR"), ["NOT_CT"]),
    "one slice cut short": (one_cut, ["UNREADABLE"]),
    "one slice blank": (one_blank, ["MISSING_SLICES", "UNREADABLE"]),
    "no rows": (lambda src: slices(src/"s", Rows=None), ["UNREADABLE"]),
    "no slope": (lambda src: slices(src/"s", RescaleSlope=0), ["NOT_HU"]),
    "huge": (lambda src: slices(src/"s", Rows=60000, Columns=60000), ["TOO_LARGE"]),
    "sform and qform disagree": (two_forms, ["NO_ORIENTATION"]),
    "neither sform nor qform": (lambda src: nifti(src/"s.nii", sform=0, qform=0), ["NO_ORIENTATION"]),
    "4-D": (lambda src: nifti(src/"s.nii", hu=np.stack([BODY.hu]*2, -1)), ["NOT_A_VOLUME"]),
    "slope nan": (lambda src: nifti(src/"s.nii", scl_slope=np.nan), [""]),
    "outliers": (outliers, [""]),
    "labels": (lambda src: nifti(src/"s.nii", hu=(BODY.hu > 0)), ["NOT_HU"]),
    "labels beside their CT": (labels_beside, [""]),
    "a copy with another name": (lambda src: shutil.copy(nifti(src/"a.nii"), src/"b.nii"), [""]),
    "cut": (cut_nifti, ["UNREADABLE"]),
    "text": (lambda src: (src/"s.nii.gz").write_text("Dear colleague"), ["UNREADABLE"]),
    "downloads that failed alike": (failed_downloads, ["UNREADABLE"]*3),
    "blank": (lambda src: (src/"s.dcm").touch(), ["UNREADABLE"]),
    "nothing of ours": (nothing_of_ours, []),
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
        assert (row["status"] == "accepted") == (not row["reason"]) == path.exists()
        assert bool(row["sentence"]) == bool(row["reason"]) and "\n" not in row["sentence"]
        assert not any(value in row["sentence"] for value in PATIENT.values())
        if path.exists():
            hu = read_ct(path).hu
            assert -1024 <= hu.min() and hu.max() <= 3071 and hu.shape[2] == 20


def test_every_reason_is_met():
    met = {reason for _, reasons in FILES.values() for reason in reasons} - {""}
    elsewhere = {"BAD_LABELS", "MIXED_SERIES", "COVERAGE", "BY_HAND", "FAILED"}  # of read_ct, and of the tests below
    of_pairs = {"TOO_SHORT", "NO_FOLD"}
    assert met | elsewhere | of_pairs == set(REASONS) and not met & elsewhere


def test_reasons_of_read_ct(place):
    assert error_code(lambda: read_ct(slices(slices(place/"src"/"s")))) == "MIXED_SERIES"
    nifti(place/"a.nii")
    nifti(place/"a_labels.nii.gz", body((20, 20, 12)))
    assert error_code(lambda: read_ct(place/"a.nii")) == "BAD_LABELS"


# ---- resampling and what is written ----------------------------------------------------------------------------------

@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_resampling_as_simpleitk_does(spacing):
    "Against SimpleITK's linear resampler on the same grid, after its Gaussian of the same width"
    noise = np.random.default_rng(0).normal(0, 100, (40, 36, 30)).astype(np.float32)
    smooth = CT(noise, BODY.affine @ np.diag([0.6, 0.6, 1.2, 1]))
    ours = smooth.resample(spacing)
    image = sitk.GetImageFromArray(smooth.hu.T)
    image.SetSpacing(smooth.spacing.tolist())
    image.SetOrigin(smooth.affine[:3, 3].tolist())
    sigma = np.sqrt(np.maximum(spacing**2 - smooth.spacing**2, 0))/2.355
    edge = dict(boundaryCondition=sitk.ConvolutionImageFilter.ZERO_FLUX_NEUMANN_PAD)
    for axis in np.flatnonzero(sigma):
        kernel = np.exp(-0.5*(np.arange(-9, 10)*smooth.spacing[axis]/sigma[axis])**2)
        kernel = np.expand_dims(kernel/kernel.sum(), [i for i in range(3) if i != 2 - axis])
        image = sitk.Convolution(sitk.Cast(image, sitk.sitkFloat64), sitk.GetImageFromArray(kernel), **edge)
    size, origin = [int(n) for n in ours.shape], ours.affine[:3, 3].tolist()
    theirs = sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, origin, [spacing]*3)
    theirs = sitk.GetArrayFromImage(theirs).T
    inside = (slice(2, -2),)*3  # SimpleITK puts zeros beyond the last voxel centre
    assert np.abs(ours.hu - theirs)[inside].max() < 0.5 and ours.hu.std() > 10


def test_nothing_tells_who_it_is(place):
    named = slices(place/"src"/"Secret Name 1944")
    texts = dict(descrip=b"Secret^Name", aux_file=b"ID4711", db_name=b"ID4711", intent_name=b"Secret")
    nifti(place/"src"/"Smith_John_19440506.nii.gz", **texts)
    rows = run(place, IngestConfig(spacing=2, min_slices=20, coverage=False))
    assert {row["status"] for row in rows.values()} == {"accepted"}
    assert len({row["patient"] for row in rows.values()}) == 2
    uids = {pydicom.dcmread(path).SeriesInstanceUID for path in named.iterdir()}
    words = [word.encode() for word in (*PATIENT.values(), "Secret", "Smith", "1944", *uids, str(place))]
    files = sorted((place/"out").iterdir())
    assert len(files) == 3 and files[-1].name == "salt"
    for path in files:
        assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{12}\.nii\.gz|salt", path.name)
        data = path.read_bytes()
        header = gzip.decompress(data)[:352] if path.suffix == ".gz" else b""
        assert not any(word in text for word in words for text in (data, header))
        assert header[148:148 + 80 + 24] in (b"", bytes(104))  # descrip, aux_file
    private = (place/"report.csv").read_text() + (place/"report.csv.log").read_text()
    assert not any(word in private for word in ("ID4711", "2005", *uids))  # it tells paths, no dates or identifiers


def test_the_same_input_gives_the_same_bytes(place):
    slices(place/"src"/"s", series="1.2.3")
    nifti(place/"src"/"n.nii")
    def written(): return {path.name: path.read_bytes() for path in (place/"out").iterdir()}
    run(place)
    once = written()
    shutil.rmtree(place/"out")
    (place/"src").rename(place/"moved")
    (place/"moved"/"s").rename(place/"moved"/"t")
    ingest([place/"moved"], place/"out", place/"other.csv", EASY, workers=2)
    assert once == written() and len(once) == 2
    shutil.rmtree(place/"out")
    run(place, IngestConfig(spacing=2, min_slices=20, coverage=False), "moved", "third.csv")
    assert not set(once) & set(written())  # another salt


def test_era_and_year(place):
    for i in range(8):
        slices(place/"src"/f"s{i}", body((20, 20, 20)), AcquisitionDate=f"20{i:02}0715", StudyDate="19990101")
    slices(place/"src"/"undated", body((20, 20, 20)), AcquisitionDate="", StudyDate="")
    nifti(place/"src"/"n.nii")
    rows = run(place)
    assert [rows[f"s{i}"]["era"] for i in range(8)] == list("11223344")
    assert rows["undated"]["era"] == rows["n.nii"]["era"] == ""
    assert {row["year"] for row in rows.values()} == {""} and "0715" not in (place/"report.csv").read_text()
    again = run(place, replace(EASY, years=True))
    assert [again[f"s{i}"]["year"] for i in range(8)] == [f"{2000 + i}" for i in range(8)]
    assert [row["patient"] for row in again.values()].count(again["s0"]["patient"]) == 9  # one PatientID


def test_whose_ct(place):
    for seed, name in enumerate(("P1/ct.nii", "P1/late.nii", "P2/ct.nii")):
        path = place/"src"/name
        path.parent.mkdir(exist_ok=True)
        nifti(path, CT(BODY.hu + np.random.default_rng(seed).integers(0, 9, BODY.shape), BODY.affine))
    slices(place/"src"/"d", PatientID="P1")
    slices(place/"src"/"e", PatientID="P1", IssuerOfPatientID="elsewhere")
    config = replace(EASY, patient=r"/(P\d)/")
    rows = ingest([place/"src"], place/"out", place/"report.csv", config, workers=0)
    def patients(part): return {row["patient"] for row in rows if part in row["source"]}
    assert [len(patients(part)) for part in ("/P1/", "/P2/", "/d", "/e", "")] == [1, 1, 1, 1, 3]


# ---- the user's decisions --------------------------------------------------------------------------------------------

def decide(report, **decisions):
    "Write decisions into the report, as a user would"
    rows = list(csv.DictReader(report.open()))
    for row in rows: row["decision"] = decisions.get(source_name(row), row["decision"])
    with report.open("w") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def column(rows, name): return {source: row[name] for source, row in rows.items()}


def test_decisions_are_honoured_and_kept(place):
    slices(place/"src"/"good")
    slices(place/"src"/"thick", body(spacing=(1.5, 1.5, 3.0)))
    slices(place/"src"/"tilt", shear=0.2)
    nifti(place/"src"/"bare")
    config = replace(EASY, coverage=True)
    expected = dict(good="COVERAGE", thick="TOO_THICK", tilt="GANTRY_TILT", bare="COVERAGE")
    assert column(run(place, config), "reason") == expected
    decide(place/"report.csv", good="accept", thick=" Accept", tilt="accept")
    rows = run(place, config)
    assert column(rows, "reason") == expected | dict(good="", thick="")
    assert column(rows, "decision") == dict(good="accept", thick="accept", tilt="accept", bare="")
    assert rows["good"]["proposal"].startswith("refuse: ")
    decide(place/"report.csv", good="refuse")
    again = run(place, config)
    assert again["good"]["reason"] == "BY_HAND" and again["thick"]["status"] == "accepted"
    assert not (place/"out"/f"{again['good']['name']}.nii.gz").exists()
    for name in ("thick", "good"): shutil.rmtree(place/"src"/name)  # what was decided stays when its source is away
    assert column(run(place, config), "decision") == column(again, "decision")
    decide(place/"report.csv", tilt="perhaps")
    assert error_code(lambda: run(place, config)) == "BAD_DECISION"


def test_another_source_adds_to_the_report(place):
    nifti(place/"src"/"a.nii")
    (place/"more").mkdir()
    nifti(place/"more"/"b.nii", body((30, 24, 30)))
    nifti(place/"more"/"c.nii", body((30, 24, 12)))
    run(place)
    assert list(run(place, source="more")) == ["b.nii", "c.nii", "a.nii"]
    assert len(list((place/"out").glob("*.nii.gz"))) == 2
    (place/"more"/"c.nii").unlink()  # a refused one that is gone is forgotten
    assert len(run(place, source="more")) == 2


def test_a_bad_salt_or_report_is_left_alone(place):
    nifti(place/"src"/"a.nii")
    (place/"fruit.csv").write_text("fruit,price\n")
    assert error_code(lambda: run(place, report="fruit.csv")) == "NOT_A_REPORT"
    assert (place/"fruit.csv").read_text() == "fruit,price\n"
    (place/"out").mkdir(exist_ok=True)
    (place/"out"/"salt").touch()
    assert error_code(lambda: run(place, replace(EASY, salt=None))) == "NO_SALT"


# ---- again, and killed -----------------------------------------------------------------------------------------------

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


def whole_files(out):
    "Finished CTs, and when they were made"
    return {path.name: path.stat().st_mtime_ns for path in out.glob("[0-9a-f]*.nii.gz")} if out.exists() else {}


def journal_names(report):
    "The CTs that the journal says are done"
    rows = [rows for key, rows in Journal(report.with_suffix(".csv.log")).values.items() if key.startswith("rows")]
    return {f"{row['name']}.nii.gz" for row in sum(rows, [])}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), prepare) as server: yield server


def prepare(): "Importing this file is enough."


def test_killed_and_run_again(place, server):
    "A real process, killed twice with its workers: nothing is lost, nothing whole is made twice"
    for i in range(12):
        hu = np.random.default_rng(i).normal(0, 50, (90, 80, 80)).astype(np.float32) + i
        nifti(place/"src"/f"{i:02}.nii.gz", CT(hu, BODY.affine))
    config = IngestConfig(min_slices=20, coverage=False, salt="salt of the tests")
    out, report, seen = place/"out", place/"report.csv", {}
    call = partial(ingest, [place/"src"], out, report, config, workers=2)
    for target in (2, 6):
        process = server.start(call)
        wait_until(lambda: len(whole_files(out)) >= target, 180)
        assert server.kill(process).was_killed
        now = whole_files(out)
        assert target <= len(now) < 12 and all(now[name] == stamp for name, stamp in seen.items())
        for name in now: read_ct(out/name)
        done = journal_names(report)
        seen = {name: stamp for name, stamp in now.items() if name in done}
    assert len(seen) >= 2
    assert server(call).status == 0
    rows = read_report(report)
    assert len(rows) == 12 and {row["status"] for row in rows.values()} == {"accepted"}
    now = whole_files(out)
    assert len(now) == 12 and all(now[name] == stamp for name, stamp in seen.items())
    assert not [path for path in out.iterdir() if path.name.startswith(".")]  # what the killed runs left is gone
    first = {name: (out/name).read_bytes() for name in now}
    shutil.rmtree(out)
    run(place, config, report="once.csv")
    assert first == {name: (out/name).read_bytes() for name in whole_files(out)}


def deadly(number):
    "A worker that dies of one job"
    if number == 5: os.kill(os.getpid(), signal.SIGKILL)
    return -number


def test_a_worker_that_dies_costs_one_job():
    found = list(parallel_map(deadly, list(range(12)), 2))
    assert sorted(found) == sorted((n, None if n == 5 else -n) for n in range(12))


def poisoned(job, out, config):
    "As `curate_series`, but one CT kills its process"
    if job[0].files[0].endswith("2.nii"): os.kill(os.getpid(), signal.SIGKILL)
    return curate_series(job, out, config)


def test_a_killed_worker_is_a_row_and_is_tried_again(place, monkeypatch):
    for i in range(5): nifti(place/"src"/f"{i}.nii", body((30, 24, 30 + i)))
    monkeypatch.setattr(room, "curate_series", poisoned)
    rows = ingest([place/"src"], place/"out", place/"report.csv", EASY, workers=2)
    reasons = {source_name(row): row["reason"] for row in rows}
    assert reasons == {f"{i}.nii": "FAILED" if i == 2 else "" for i in range(5)}
    monkeypatch.undo()
    assert {r["reason"] for r in run(place).values()} == {""}


# ---- coverage --------------------------------------------------------------------------------------------------------

def is_accepted(ct): return judge_coverage(bone_profile(ct))["proposal"] == "accept"


@pytest.mark.parametrize("seed", range(3))
def test_proposals_for_halves_and_parts(seed):
    "Left and right halves, above and below: refused; whole: accepted"
    ct = phantom(seed, 4.0, soft=seed != 1)
    assert is_accepted(ct) == (ct.labels == LABELS["femur_left"]).any()
    middle = ct.shape[0]//2
    parts = [ct.hu[:middle], ct.hu[middle:], ct.hu[:, :, 70:], ct.hu[:, :, :60], ct.hu[:, :, :20]]
    assert not any(is_accepted(CT(part, ct.affine)) for part in parts)


def test_proposals_at_random_levels():
    "Sixteen phantoms cut at random levels around crest and trochanter"
    right, whole = 0, 0
    for seed in range(100, 116):
        random = np.random.default_rng(seed)
        ct = phantom(seed, 4.0, soft=True)
        z = ct.affine[2, 3] + 4*np.arange(ct.shape[2])
        crest = z[np.isin(ct.labels, [LABELS["hip_left"], LABELS["hip_right"]]).any((0, 1))].max()
        bones = make_skeleton(seed).bones
        lesser = min(bones[f"femur_{side}"][-1].triangles[..., 2].mean() for side in ("left", "right"))
        low = lesser + random.uniform(-90, 40)
        high = crest + random.uniform(-40, 90)
        part = CT(ct.hu[:, :, slice(*np.searchsorted(z, [low, high]))], ct.affine)
        is_whole = low <= lesser and high >= crest
        whole += is_whole
        right += is_whole == is_accepted(part)
    assert right >= 14 and 3 < whole < 13


# ---- names, dates, tables --------------------------------------------------------------------------------------------

def test_another_name_for_the_patient_replaces_the_old_copy(place):
    (place/"src"/"anna").mkdir(parents=True)
    write_ct(BODY, place/"src"/"anna"/"ct.nii.gz")
    (first,) = run(place).values()
    (second,) = run(place, replace(EASY, patient="/src/([^/]+)/")).values()
    assert first["status"] == second["status"] == "accepted"
    assert first["patient"] != second["patient"]
    assert [path.name for path in (place/"out").glob("*.nii.gz")] == [f"{second['name']}.nii.gz"]


def test_the_date_is_that_of_the_scan_and_not_of_its_export(place):
    dates = dict(StudyDate="20050601", SeriesDate="20050601", AcquisitionDate="", ContentDate="20190820")
    slices(place/"src"/"s", **dates)
    assert run(place, replace(EASY, years=True))["s"]["year"] == "2005"


def test_a_report_with_spaces_and_semicolons_is_the_same_report(place):
    slices(place/"src"/"s")
    row = run(place)["s"]
    report = place/"report.csv"
    (cells,) = csv.DictReader(report.open())
    cells["decision"] = " Refuse "
    report.write_text("\ufeff" + " ; ".join(cells) + "\n" + " ; ".join(cells.values()) + "\n", encoding="utf-8")
    again = run(place)["s"]
    assert (again["name"], again["reason"], again["decision"]) == (row["name"], "BY_HAND", "refuse")
    assert not list((place/"out").glob("*.nii.gz"))


def test_two_ingests_at_once(place):
    slices(place/"src"/"s")
    (place/"out").mkdir()
    with folder_lock(place/"out"): assert error_code(lambda: run(place)) == "LOCKED"
