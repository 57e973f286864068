"""CT files that were read wrong once, and others of their kind, each with its right value: by formula, nibabel or GDCM."""
import json, warnings, zipfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom import uid
from pydicom.fileset import FileSet

from helpers import body, make_dicom, make_sequence, save_dicom, write_enhanced, write_nifti_file, write_series
from radrotator.cli import main
from radrotator.core import RadRotatorWarning, error_code
from radrotator.ct.curate import IngestConfig
from radrotator.ct.ingest import ingest
from radrotator.ct.read import read_ct
from radrotator.evaluate.patients import SEEN, ct_patients

BODY = body()
EASY = IngestConfig(spacing=2, min_slices=10, max_thickness=3, coverage=False, salt="salt of the tests")
Y, X = np.mgrid[:24, :30]
RING = (Y - 11.5)**2/11**2 + (X - 14.5)**2/14**2 > 1  # outside the scan circle, in a slice as it is stored
IN_RING = RING[::-1, ::-1].T                          # the same voxels, as they are read


def ingest_reasons(tmp_path, source):
    "Why the series of a source are refused, sorted; an empty reason for each that is accepted"
    return sorted(row["reason"] for row in ingest([source], tmp_path/"out", tmp_path/"r.csv", EASY, workers=0))


def check_same(path, ct=BODY, atol=1):
    "Read a CT that must have these voxels, in their place; stored slopes of 2 round to 1 HU"
    read = read_ct(path)
    assert read.shape == ct.shape
    assert np.abs(read.hu - ct.hu).max() <= atol
    assert np.allclose(read.affine, ct.affine, atol=2e-3)


def edit(path, change):
    "Change a DICOM file"
    ds = pydicom.dcmread(path)
    change(ds)
    return save_dicom(ds, path)


def slices_with(change=lambda k, ds: None, **header):
    "A maker of series whose slices are changed"
    return lambda folder: write_series(folder, BODY, spoil=change, **header)


def enhanced_with(change=lambda ds: None, **macros):
    "A maker of a folder with one enhanced file that is changed"
    def make(folder):
        folder.mkdir()
        edit(write_enhanced(folder/"all.dcm", BODY, **macros), change)
        return folder
    return make


# ---- padding ---------------------------------------------------------------------------------------------------------

def pad(ds, value, kind, fill):
    "Fill the ring of every frame, and say so in the header, with that VR"
    stored = np.frombuffer(ds.PixelData, "<u2").reshape(-1, 24, 30).copy()
    stored[:, RING] = fill
    ds.PixelData = stored.tobytes()
    ds.add_new("PixelPaddingValue", kind, value)


def pad_range(ds, first, last, kind):
    "Fill the ring with a value between these two"
    pad(ds, first, kind, 65003)
    ds.add_new("PixelPaddingRangeLimit", kind, last)


PADDING = dict(
    plain=lambda ds: pad(ds, 65535, "US", 65535),
    other_sign=lambda ds: pad(ds, -1, "SS", 65535),
    of_a_range=lambda ds: pad_range(ds, 65000, 65535, "US"),
    of_a_range_downwards=lambda ds: pad_range(ds, 65535, 65000, "US"),
    of_a_range_with_the_other_sign=lambda ds: pad_range(ds, -1, -900, "SS"),
    as_dense_as_bone=lambda ds: pad(ds, 3000, "US", 3000),
)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("form", ["series", "enhanced"])
def test_padding_is_air(tmp_path, padding, form):
    "Case 04: what stands at the top of an enhanced header counts for every frame; case 05: whatever its sign"
    make = slices_with(lambda k, ds: PADDING[padding](ds)) if form == "series" else enhanced_with(PADDING[padding])
    read = read_ct(make(tmp_path/"a"))
    assert (read.hu[IN_RING] == -1024).all()
    assert np.abs(read.hu - BODY.hu)[~IN_RING].max() <= 1


def test_signed_padding_with_the_other_sign(tmp_path):
    def signed(k, ds):
        stored = (np.frombuffer(ds.PixelData, "<u2").reshape(24, 30).astype(int)*(1 + k % 2) - 1024 - k).astype("<i2")
        stored[RING] = 5000
        ds.PixelData = stored.tobytes()
        ds.PixelRepresentation, ds.RescaleSlope, ds.RescaleIntercept = 1, 1, 0
        ds.add_new("PixelPaddingValue", "SS", 5000)
    read = read_ct(slices_with(signed)(tmp_path/"a"))
    assert (read.hu[IN_RING] == -1024).all() and np.abs(read.hu - BODY.hu)[~IN_RING].max() <= 1


def test_tissue_with_the_value_of_padding_stays(tmp_path):
    "PixelPaddingValue is that of soft tissue, 40 HU; inside the body nothing is padding"
    def padded(k, ds): ds.PixelPaddingValue = (40 + 1024 + k)//(1 + k % 2)
    check_same(slices_with(padded)(tmp_path/"a"))


def test_padding_is_no_air(tmp_path):
    "What only padding makes look like Hounsfield units is refused"
    def no_hu(k, ds):
        ds.RescaleSlope, ds.RescaleIntercept, ds.PixelRepresentation = 1, 0, 1
        pad(ds, -2000, "SS", 63536)
    assert error_code(lambda: read_ct(slices_with(no_hu)(tmp_path/"a"))) == "NOT_HU"


# ---- what the numbers are --------------------------------------------------------------------------------------------

NOT_HU = dict(
    iodine=dict(RescaleType="MGML"),
    atomic_number=dict(RescaleType="Z_EFF"),
    no_unit=dict(RescaleType="US"),
    private=dict(RescaleType="mystery"),
    electron_density=dict(ImageType=["DERIVED", "PRIMARY", "AXIAL", "ELECTRON_DENSITY"]),
    no_slope=dict(RescaleSlope=None),
    no_intercept=dict(RescaleIntercept=None, RescaleType="HU"),
    neither=dict(RescaleSlope=None, RescaleIntercept=None),
    zero=dict(RescaleSlope=0),
    table=dict(ModalityLUTSequence=make_sequence(LUTDescriptor=[1, 0, 16], LUTData=b"\0\0", ModalityLUTType="HU")),
    colours=dict(PhotometricInterpretation="PALETTE COLOR"),
)


@pytest.mark.parametrize("name", NOT_HU)
@pytest.mark.parametrize("form", ["series", "enhanced"])
def test_what_is_not_hounsfield(tmp_path, name, form):
    "Case 07"
    fields = NOT_HU[name]
    def change(ds):
        for frame in ds.PerFrameFunctionalGroupsSequence:
            item = frame.PixelValueTransformationSequence[0]
            for key, value in fields.items(): setattr(item if key.startswith("Rescale") else ds, key, value)
    make = slices_with(**fields) if form == "series" else enhanced_with(change)
    folder = make(tmp_path/"a")
    assert error_code(lambda: read_ct(folder)) == "NOT_HU"
    assert ingest_reasons(tmp_path, folder) == ["NOT_HU"]
    assert not list((tmp_path/"out").glob("*.nii.gz"))


@pytest.mark.parametrize("unit", ["HU", "hu", None, ""])
def test_what_is_hounsfield(tmp_path, unit): check_same(slices_with(RescaleType=unit)(tmp_path/"a"))


def stored_hounsfield(**fields):
    "A series of signed Hounsfield units, and more of its header"
    def change(k, ds):
        stored = np.frombuffer(ds.PixelData, "<u2").astype(int)*(1 + k % 2) - 1024 - k
        ds.PixelData = stored.astype("<i2").tobytes()
        ds.PixelRepresentation = 1
        for name, value in fields.items(): setattr(ds, name, value)
    return slices_with(change)


def test_an_empty_rescale(tmp_path):
    "Case 10: stored values that RescaleType calls HU are HU; without that word they need not be"
    nothing = dict(RescaleSlope=None, RescaleIntercept=None)
    check_same(stored_hounsfield(**nothing, RescaleType="HU")(tmp_path/"a"))
    assert error_code(lambda: read_ct(stored_hounsfield(**nothing)(tmp_path/"b"))) == "NOT_HU"


HARMLESS = dict(
    window=dict(WindowCenter=None, WindowWidth=None, VOILUTFunction=None),
    thickness=dict(SliceThickness=None),
    number=dict(InstanceNumber=None),
    frames=dict(NumberOfFrames=None),
    padding=dict(PixelPaddingValue=None),
    image_type=dict(ImageType=None),
    lut=dict(ModalityLUTSequence=pydicom.Sequence()),
    bone_dark=dict(PhotometricInterpretation="MONOCHROME1"),  # how to show it, not what it is
)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_ct_can_do_without(tmp_path, name): check_same(slices_with(**HARMLESS[name])(tmp_path/"a"))


def write_text(name, text):
    "A change of a slice: the text, as bytes, instead of a number"
    tag = pydicom.tag.Tag(name)
    raw = pydicom.dataelem.RawDataElement(tag, "DS", len(text), text, 0, False, True)
    def change(k, ds): ds[tag] = raw
    return change


def test_text_instead_of_numbers(tmp_path):
    "An attribute nobody needs does no harm; one that is needed is refused by its name"
    check_same(slices_with(write_text("SliceThickness", b"thick "))(tmp_path/"a"))
    spaced = slices_with(write_text("PixelSpacing", b"0,7\\0,7 "))(tmp_path/"b")  # a comma can only be a decimal mark
    assert np.allclose(read_ct(spaced).spacing, [0.7, 0.7, 1])
    needed = dict(PixelSpacing="BAD_GEOMETRY", RescaleSlope="NOT_HU", ImagePositionPatient="BAD_GEOMETRY")
    for name, code in needed.items():
        with pytest.raises(Exception) as caught: read_ct(slices_with(write_text(name, b"words "))(tmp_path/name))
        assert caught.value.code == code and name in str(caught.value).replace(str(tmp_path), "")


# ---- enhanced files --------------------------------------------------------------------------------------------------

def move_up(*names):
    "Move macros from the frames, where all are the same, to where all frames share them"
    def change(ds):
        for name in names:
            ds.SharedFunctionalGroupsSequence[0][name] = ds.PerFrameFunctionalGroupsSequence[0][name]
            for frame in ds.PerFrameFunctionalGroupsSequence: del frame[name]
    return change


def one_rescale(ds):
    "One slope and one intercept for all frames"
    stored = np.frombuffer(ds.PixelData, "<u2").reshape(-1, 24, 30).astype(int)
    for picture, frame in zip(stored, ds.PerFrameFunctionalGroupsSequence):
        rescale = frame.PixelValueTransformationSequence[0]
        picture[:] = picture*int(rescale.RescaleSlope) + int(rescale.RescaleIntercept) + 1024
        rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1024
    ds.PixelData = stored.astype("<u2").tobytes()


def rescale_at_the_top(ds):
    one_rescale(ds)
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    for frame in ds.PerFrameFunctionalGroupsSequence: del frame.PixelValueTransformationSequence


def spacing_for_each_frame(ds):
    measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    del ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    for frame in ds.PerFrameFunctionalGroupsSequence: frame.PixelMeasuresSequence = measures


def empty_for_each_frame(ds):
    move_up("PlaneOrientationSequence")(ds)
    for frame in ds.PerFrameFunctionalGroupsSequence:
        frame.PlaneOrientationSequence = make_sequence(ImageOrientationPatient=None)


ENHANCED = dict(
    as_it_is=lambda ds: None,
    shared_orientation=move_up("PlaneOrientationSequence"),
    shared_rescale=lambda ds: (one_rescale(ds), move_up("PixelValueTransformationSequence")(ds)),
    rescale_at_the_top=rescale_at_the_top,
    spacing_for_each_frame=spacing_for_each_frame,
    empty_for_each_frame=empty_for_each_frame,
)


@pytest.mark.parametrize("name", ENHANCED)
def test_an_enhanced_file_is_as_good_as_its_folder(tmp_path, name):
    "Case 17, and every place in which the standard lets an attribute of a frame stand"
    folder = enhanced_with(ENHANCED[name])(tmp_path/"a")
    check_same(folder)
    check_same(folder/"all.dcm")
    assert ingest_reasons(tmp_path, folder/"all.dcm") == [""]


def test_an_enhanced_file_against_gdcm(tmp_path):
    def change(ds):
        ENHANCED["shared_rescale"](ds)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uid.EnhancedCTImageStorage
    folder = enhanced_with(change)(tmp_path/"a")
    frames = pydicom.dcmread(folder/"all.dcm").PerFrameFunctionalGroupsSequence
    order = np.argsort([frame.PlanePositionSequence[0].ImagePositionPatient[2] for frame in frames])
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(folder/"all.dcm")))  # GDCM keeps the order of the frames
    assert np.array_equal(theirs[order], read_ct(folder).hu[::-1, ::-1].T)


def test_frames_that_are_not_placed(tmp_path):
    def one_less(ds): ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:-1]
    def no_groups(ds): del ds.PerFrameFunctionalGroupsSequence
    for i, change in enumerate((one_less, no_groups)):
        assert error_code(lambda: read_ct(enhanced_with(change)(tmp_path/f"{i}")/"all.dcm")) == "MULTI_FRAME"


def test_files_that_are_no_volume(tmp_path):
    write_series(tmp_path/"a", BODY, drop=range(1, 40))
    assert error_code(lambda: read_ct(tmp_path/"a"/"IM0000")) == "TOO_FEW_SLICES"
    save_dicom(make_dicom(np.zeros((24, 30), np.uint16), "DX"), tmp_path/"dx.dcm")
    assert error_code(lambda: read_ct(tmp_path/"dx.dcm")) == "NOT_CT"


# ---- one stack, in its place -----------------------------------------------------------------------------------------

def jitter(angle, size):
    "Slices turned about z by an angle, whose cosines differ by so much from slice to slice"
    def change(k, ds): ds.ImageOrientationPatient = [1, angle + size*(-1)**k, 0, -angle, 1, 0]
    return change


@pytest.mark.parametrize("angle", [0.0005, 0.0015, -0.0025, 0])  # where three decimals are rounded up or down
@pytest.mark.parametrize("size", [1e-6, 3e-4])
def test_orientations_that_differ_in_the_last_digits(tmp_path, angle, size):
    "Case 14: one CT, as GDCM says, and not two of every other slice"
    folder = slices_with(jitter(angle, size))(tmp_path/"a")
    read = read_ct(folder)
    assert read.shape == BODY.shape and np.abs(read.hu - BODY.hu).max() <= 1
    assert np.allclose(read.spacing, BODY.spacing, rtol=1e-3)
    assert np.allclose(read.affine[:3, 0]/1.5, [1, angle, 0], atol=4e-4)
    assert ingest_reasons(tmp_path, folder) == [""]


@pytest.mark.parametrize("spacing", [0.70315, 0.97655])
def test_spacings_that_differ_in_the_last_digits(tmp_path, spacing):
    def change(k, ds): ds.PixelSpacing = [spacing + 1e-7*(-1)**k]*2
    assert np.allclose(read_ct(slices_with(change)(tmp_path/"a")).spacing, [spacing, spacing, 1], atol=1e-5)


def test_pixels_that_are_not_square(tmp_path):
    ct = body((30, 24, 40), (1.5, 0.9, 1.0))
    folder = write_series(tmp_path/"a", ct)
    check_same(folder, ct)
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    assert np.allclose(image.GetSpacing(), ct.spacing)


def test_two_orientations_stay_two(tmp_path):
    def turn(k, ds): ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0] if k < 20 else [1, 0.01, 0, -0.01, 1, 0]
    assert error_code(lambda: read_ct(slices_with(turn)(tmp_path/"a"))) == "MIXED_SERIES"


def test_a_slice_of_another_size_is_not_passed_by(tmp_path):
    "Only pictures across the stack are localizers"
    folder = write_series(tmp_path/"a", BODY, series="1.2.3", drop=[39])
    write_series(folder, body((40, 30, 40)), series="1.2.3", drop=range(39))
    assert error_code(lambda: read_ct(folder)) == "MIXED_SERIES"


def moved(along=lambda k: 0.0, across=lambda k: 0.0, step=1.0):
    "Slices at other places than the even grid's"
    def change(k, ds): ds.ImagePositionPatient = [across(k), 0, float(f"{step*k + along(k):.6f}")]
    return change


GRIDS = dict(
    rounded_to_a_tenth=(moved(lambda k: round(0.625*k, 1) - 0.625*k, step=0.625), None),
    jitter=(moved(lambda k: 0.04*(-1)**k), None),
    thin_and_rounded=(moved(lambda k: round(0.25*k, 1) - 0.25*k, step=0.25), None),
    sideways_a_little=(moved(across=lambda k: 0.2*(-1)**k), None),
    drift=(moved(lambda k: 0.0025*(k - 20)**2), "UNEVEN_SLICES"),  # no step differs by a tenth from the next
    two_spacings=(moved(lambda k: 0.06*max(0, k - 20)), "UNEVEN_SLICES"),
    gap_at_a_third=(moved(lambda k: 0.4*(k > 13)), "UNEVEN_SLICES"),
    one_sideways=(moved(across=lambda k: 25.0*(k == 7)), "BAD_GEOMETRY"),
    half_sideways=(moved(across=lambda k: 25.0*(k > 19)), "BAD_GEOMETRY"),
    tilt=(moved(across=lambda k: 0.2*k), "GANTRY_TILT"),
    metres=(moved(step=0.001), "BAD_GEOMETRY"),
    missing=(moved(lambda k: 1.0*(k > 13)), "MISSING_SLICES"),
    double=(moved(lambda k: -0.999*(k == 13)), "DUPLICATE_SLICES"),
)


@pytest.mark.parametrize("name", GRIDS)
def test_distances_from_the_even_grid(tmp_path, name):
    change, code = GRIDS[name]
    folder = slices_with(change)(tmp_path/"a")
    if code: assert error_code(lambda: read_ct(folder)) == code
    else:
        read = read_ct(folder)
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
        theirs = sitk.GetArrayFromImage(sitk.ReadImage(names))
        assert np.array_equal(theirs, read.hu[::-1, ::-1].T)  # in the same order
        places = np.sort([pydicom.dcmread(path).ImagePositionPatient[2] for path in names])
        assert np.abs(read.affine[2, 3] + read.spacing[2]*np.arange(40) - places).max() < 0.06


# ---- how a file is encoded -------------------------------------------------------------------------------------------

SYNTAXES = dict(
    implicit=dict(syntax=uid.ImplicitVRLittleEndian),
    big_endian=dict(syntax=uid.ExplicitVRBigEndian),
    deflated=dict(syntax=uid.DeflatedExplicitVRLittleEndian),
    rle=dict(compress=(uid.RLELossless, {})),
    jpeg_ls=dict(compress=(uid.JPEGLSLossless, {})),
    jpeg_2000=dict(compress=(uid.JPEG2000Lossless, {})),
)


@pytest.mark.parametrize("name", SYNTAXES)
def test_transfer_syntaxes_as_gdcm_reads_them(tmp_path, name):
    ct = body((70, 66, 12))  # JPEG 2000 wants 64 pixels a side
    folder = write_series(tmp_path/"a", ct, **SYNTAXES[name])
    check_same(folder, ct)
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))))
    assert np.array_equal(theirs, read_ct(folder).hu[::-1, ::-1].T)


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.JPEGLSLossless])
def test_enhanced_and_compressed(tmp_path, syntax):
    check_same(enhanced_with(lambda ds: ds.compress(syntax))(tmp_path/"a"))


def test_an_unknown_syntax_is_refused(tmp_path):
    def film(ds):
        ds.file_meta.TransferSyntaxUID = uid.MPEG2MPML
        ds.PixelData = pydicom.encaps.encapsulate([b"\0\0\1\xb3" + bytes(60)])
        ds["PixelData"].VR = "OB"
    folder = write_series(tmp_path/"a", BODY)
    for path in folder.iterdir(): edit(path, film)
    assert error_code(lambda: read_ct(folder)) == "UNREADABLE"


def strip(path, meta):
    "Take the 128 bytes and the mark away, and the group behind them"
    data = path.read_bytes()
    path.write_bytes(data[132:] if meta else data[144 + int.from_bytes(data[140:144], "little"):])


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("ending", ["", ".dcm", ".txt"])
@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_files_without_a_preamble(tmp_path, meta, ending, syntax):
    "Case 13: they are DICOM, whatever they are called"
    folder = write_series(tmp_path/"a", BODY, syntax=syntax)
    for path in list(folder.iterdir()):
        strip(path, meta)
        path.rename(f"{path}{ending}")
    check_same(folder)
    assert ingest_reasons(tmp_path, folder) == [""]


def test_an_enhanced_file_without_a_preamble(tmp_path):
    path = enhanced_with()(tmp_path/"a")/"all.dcm"
    strip(path, True)
    check_same(path)


# ---- a disc ----------------------------------------------------------------------------------------------------------

def test_an_index_is_no_slice(tmp_path):
    "A DICOMDIR under another name, beside the slices that it lists"
    index = FileSet()
    names = dict(StudyID="1", SeriesNumber=1, StudyTime="1200")
    index.add(write_series(tmp_path/"one", BODY, drop=range(1, 40), **names)/"IM0000")
    index.write(tmp_path/"disc")
    folder = write_series(tmp_path/"a", BODY)
    (tmp_path/"disc"/"DICOMDIR").rename(folder/"index")
    check_same(folder)
    assert ingest_reasons(tmp_path, folder) == [""]
    assert error_code(lambda: read_ct(folder/"index")) == "NOT_CT"


def test_a_folder_of_several_series(tmp_path):
    folder = write_series(tmp_path/"a", BODY)
    for path in folder.iterdir(): edit(path, lambda ds: setattr(ds, "SeriesInstanceUID", uid.generate_uid()))
    assert error_code(lambda: read_ct(folder)) == "MIXED_SERIES"
    assert ingest_reasons(tmp_path, folder) == ["TOO_FEW_SLICES"]*40


# ---- what ingest says ------------------------------------------------------------------------------------------------

def ingest_json(capfd, tmp_path, *words):
    "Exit status of radrotator ingest, and what it says to scripts"
    words = "ingest", tmp_path/"src", "-o", tmp_path/"cts", "--spacing", 4, "--workers", 1, "--json", *words
    capfd.readouterr()
    status = main([str(word) for word in words])
    return status, json.loads(capfd.readouterr().out)


def test_nothing_accepted_fails_and_the_options_are_named(tmp_path, capfd):
    (tmp_path/"src").mkdir()
    write_nifti_file(tmp_path/"src"/"a.nii", body((30, 24, 40), (1.5, 1.5, 3.21)))
    write_nifti_file(tmp_path/"src"/"b.nii", body((30, 24, 30), (1.5, 1.5, 1.0)))
    status, known = ingest_json(capfd, tmp_path)
    assert (status, known["accepted"], known["options"]) == (1, 0, ["--min-slices 30"])
    words = known["options"][0].split()
    status, known = ingest_json(capfd, tmp_path, *words)
    assert (status, known["options"]) == (1, ["--max-thickness 3.3", "--no-coverage"])
    words += " ".join(known["options"]).split()
    status, known = ingest_json(capfd, tmp_path, *words)
    assert (status, known["accepted"], known["options"]) == (0, 2, [])
    assert known["roles"] == dict(train=2, validate=0, test=0)


def test_an_empty_report_is_a_failure(tmp_path, capfd):
    (tmp_path/"src").mkdir()
    (tmp_path/"src"/"letter.txt").write_text("Dear colleague")
    status, known = ingest_json(capfd, tmp_path)
    assert (status, known["series"]) == (1, 0)


def test_the_judge_says_whom_training_has_seen(tmp_path):
    for name in "abc": write_nifti_file(tmp_path/f"{name}.nii", body())
    def groups(*folds):
        rows = [f"{name},{name},{fold}" for name, fold in zip("abc", folds)]
        (tmp_path/"folds.csv").write_text("\n".join(["name,patient,fold", *rows]))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found = [(patient.name, patient.group.split(", ")[-1]) for patient in ct_patients(tmp_path)]
        return found, [one.category for one in heard]
    assert groups(1, 7, 2) == ([("CT 1", SEEN["test"])], [])
    everybody = [("CT 1", SEEN["train"]), ("CT 2", SEEN["train"]), ("CT 3", SEEN["validate"])]
    assert groups(1, 2, 6) == (everybody, [RadRotatorWarning])
    (tmp_path/"folds.csv").unlink()
    with pytest.warns(RadRotatorWarning): found = {patient.group.split(", ")[-1] for patient in ct_patients(tmp_path)}
    assert not found & {*SEEN.values()}


# ---- NIfTI -----------------------------------------------------------------------------------------------------------

def write_in_unit(path, code, scale, form="both"):
    "A NIfTI file whose lengths are multiplied, with a code of a unit"
    affine = np.diag([scale]*3 + [1]) @ BODY.affine
    image = nib.Nifti1Image(BODY.hu.astype(np.int16), affine)
    image.set_sform(affine if form != "qform" else None, int(form != "qform"))
    image.set_qform(affine if form != "sform" else None, int(form != "sform"))
    image.header["pixdim"][1:4] = scale*BODY.spacing
    image.header["xyzt_units"] = code
    nib.save(image, path)
    return path


@pytest.mark.parametrize("form", ["both", "sform", "qform"])
@pytest.mark.parametrize("code, scale", [(1, 0.001), (2, 1), (3, 1000), (0, 1), (2 + 8, 1), (3 + 8, 1000)])
def test_units_of_length(tmp_path, form, code, scale):
    "Case 19, as ITK converts them; the unit of time in the same byte does not matter"
    path = write_in_unit(tmp_path/"a.nii.gz", code, scale, form)
    check_same(path, atol=0)
    assert np.allclose(sitk.ReadImage(str(path)).GetSpacing(), read_ct(path).spacing, rtol=1e-5)
    assert ingest_reasons(tmp_path, path) == [""]


@pytest.mark.parametrize("code, scale", [(1, 1), (3, 1), (2, 1000), (0, 1000), (0, 0.001), (4, 1), (7, 1)])
def test_units_that_cannot_be(tmp_path, code, scale):
    assert error_code(lambda: read_ct(write_in_unit(tmp_path/"a.nii", code, scale))) == "BAD_GEOMETRY"


def test_labels_in_their_unit(tmp_path):
    write_in_unit(tmp_path/"a.nii.gz", 3, 1000)
    labels = replace(BODY, hu=(BODY.hu > 200).astype(np.float32))
    write_nifti_file(tmp_path/"a_labels.nii.gz", labels)
    assert np.array_equal(read_ct(tmp_path/"a.nii.gz").labels, labels.hu)


def test_two_voxel_sizes(tmp_path):
    "ITK takes the spacing of pixdim, nibabel that of the sform"
    path = write_nifti_file(tmp_path/"a.nii", BODY, qform=0, pixdim=[1, 1, 1, 1, 0, 0, 0, 0])
    assert not np.allclose(sitk.ReadImage(str(path)).GetSpacing(), nib.load(path).header.get_sform().diagonal()[:3])
    assert error_code(lambda: read_ct(path)) == "BAD_GEOMETRY"
    check_same(write_nifti_file(tmp_path/"b.nii", BODY, qform=0), atol=0)


def test_kind_by_content_and_not_by_name(tmp_path):
    write_nifti_file(tmp_path/"a.nii.gz", BODY).rename(tmp_path/"a.dcm")
    check_same(tmp_path/"a.dcm", atol=0)


SIDES = [1, 1.5, 1.5, 1, 0, 0, 0, 0]  # pixdim of the body


@pytest.mark.parametrize("side", [0, -1.5, np.nan])
def test_a_side_that_is_no_length(tmp_path, side):
    "nibabel takes 0 for 1 mm and -1.5 for 1.5, ITK turns the volume round: by the qform alone nothing is known"
    pixdim = SIDES[:1] + [side] + SIDES[2:]
    path = write_nifti_file(tmp_path/"a.nii", BODY, sform=0, pixdim=pixdim)
    assert error_code(lambda: read_ct(path)) == "BAD_GEOMETRY"
    check_same(write_nifti_file(tmp_path/"b.nii", BODY, sform=0, pixdim=SIDES), atol=0)


@pytest.mark.parametrize("scale", [(0, 0), (0, -1024), (np.nan, 5), (np.inf, 0), (1, 0)])
def test_a_scale_that_is_none(tmp_path, scale):
    "A slope of 0, or that is no number, means that values are as they are stored (NIfTI-1), whatever scl_inter says"
    check_same(write_nifti_file(tmp_path/"a.nii", BODY, scl_slope=scale[0], scl_inter=scale[1]), atol=0)


def test_half_a_scale(tmp_path):
    path = write_nifti_file(tmp_path/"a.nii", BODY, scl_slope=1, scl_inter=np.nan)
    assert error_code(lambda: read_ct(path)) == "NOT_HU"


@pytest.mark.parametrize("dtype", [np.complex64, [("R", "u1"), ("G", "u1"), ("B", "u1")]], ids=["complex", "colours"])
def test_voxels_that_are_no_numbers(tmp_path, dtype):
    voxels = BODY.hu.astype(np.complex64) if dtype == np.complex64 else np.zeros(BODY.shape, dtype)
    nib.save(nib.Nifti1Image(voxels, BODY.affine), tmp_path/"a.nii")
    assert error_code(lambda: read_ct(tmp_path/"a.nii")) == "NOT_HU"


@pytest.mark.parametrize("fields", [
    dict(qoffset_x=-65), dict(quatern_b=0, quatern_c=1, quatern_d=0), dict(srow_x=[1, 0, 0, 0]), dict(sform=0, qform=0),
], ids=str)
def test_forms_that_contradict_each_other_or_are_missing(tmp_path, fields):
    assert error_code(lambda: read_ct(write_nifti_file(tmp_path/"a.nii", BODY, **fields))) == "NO_ORIENTATION"


@pytest.mark.parametrize("fields", [
    dict(qform=0, quatern_b=0.3, quatern_c=0.4), dict(sform=0, srow_x=[9, 9, 9, 9]), dict(sform=4, qform=0),
], ids=str)
def test_a_form_without_a_code_has_no_say(tmp_path, fields):
    path = write_nifti_file(tmp_path/"a.nii", BODY, **fields)
    check_same(path, atol=0)
    assert np.allclose(np.abs(sitk.ReadImage(str(path)).GetOrigin()), np.abs(BODY.affine[:3, 3]))


@pytest.mark.parametrize("degrees", [12, 50])
def test_oblique_volumes(tmp_path, degrees):
    angle = np.radians(degrees)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = BODY.affine.copy()
    affine[:3, :3] = turn @ affine[:3, :3]
    nib.save(nib.Nifti1Image(BODY.hu.astype(np.int16), affine), tmp_path/"a.nii")
    read = read_ct(tmp_path/"a.nii")
    index = np.array([7, 16, 35])  # a voxel of the ball, on the patient's left
    place = np.linalg.solve(read.affine, affine @ [*index, 1])[:3]
    assert np.allclose(place, place.round(), atol=1e-4) and read.hu[tuple(place.round().astype(int))] == BODY.hu[tuple(index)]
    theirs = sitk.ReadImage(str(tmp_path/"a.nii"))
    point = (np.diag([-1, -1, 1, 1]) @ affine @ [*index, 1])[:3]
    assert theirs.GetPixel(*map(int, theirs.TransformPhysicalPointToIndex(point.tolist()))) == BODY.hu[tuple(index)]


def give_each_frame(macro, **fields):
    def change(ds):
        for frame in ds.PerFrameFunctionalGroupsSequence: setattr(frame, macro, make_sequence(**fields))
    return change


def test_a_frame_with_two_spacings(tmp_path):
    "The standard lets a macro stand for all frames or for each; where both do, they must agree"
    same = give_each_frame("PixelMeasuresSequence", PixelSpacing=[1.5, 1.5], SliceThickness=1)
    check_same(enhanced_with(same)(tmp_path/"a"))
    check_same(enhanced_with(give_each_frame("PixelMeasuresSequence", PixelSpacing=None))(tmp_path/"b"))
    other = give_each_frame("PixelMeasuresSequence", PixelSpacing=[3, 3])
    assert error_code(lambda: read_ct(enhanced_with(other)(tmp_path/"c"))) == "BAD_GEOMETRY"
    def two_slopes(ds):
        ENHANCED["shared_rescale"](ds)
        give_each_frame("PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=-1024)(ds)
    assert error_code(lambda: read_ct(enhanced_with(two_slopes)(tmp_path/"d"))) == "NOT_HU"


def with_another_sign(k, ds):
    "Every other slice with a sign, in 12 bits, those above them empty"
    if k % 2 == 0: return
    stored = np.frombuffer(ds.PixelData, "<u2").astype(int)*int(ds.RescaleSlope) + int(ds.RescaleIntercept)
    ds.PixelData = (stored.astype("<i2").view("<u2") & 0xFFF).tobytes()
    ds.PixelRepresentation, ds.BitsStored, ds.HighBit = 1, 12, 11
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0


def at_the_top(k, ds):
    ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") << 2).tobytes()
    ds.BitsStored, ds.HighBit = 14, 15


def garbage_behind(k, ds): ds.DataSetTrailingPadding = bytes(300)


@pytest.mark.parametrize("change", [with_another_sign, at_the_top, garbage_behind])
def test_slices_stored_in_other_ways(tmp_path, change): check_same(slices_with(change)(tmp_path/"a"))


@pytest.mark.parametrize("orientation", [[0, 1, 0, -1, 0, 0], [-1, 0, 0, 0, -1, 0]], ids=["on the side", "prone"])
def test_patients_who_lie_in_other_ways(tmp_path, orientation):
    def turn(k, ds): ds.ImageOrientationPatient = orientation
    folder = slices_with(turn, RescaleSlope=1, RescaleIntercept=-1024)(tmp_path/"a")
    theirs = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    read = read_ct(folder)
    for index in ((7, 16, 35), (22, 8, 20), (3, 3, 3)):
        point = np.diag([-1, -1, 1]) @ (read.affine @ [*index, 1])[:3]
        assert theirs.GetPixel(*theirs.TransformPhysicalPointToIndex(point.tolist())) == read.hu[index]


def test_an_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as archive: archive.writestr("IM0001", b"DICOM")
    with pytest.raises(Exception) as caught: read_ct(tmp_path/"a.zip")
    assert caught.value.code == "NOT_CT" and "Unpack" in str(caught.value)
