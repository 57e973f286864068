"""Some hundred made-up CT series, each attribute absent, empty, odd or as it should be: the Hounsfield units that were
stored, each in its place in the patient, as GDCM (and DCMTK, where bits lie oddly) reads them; or a refusal whose code
says what is wrong."""
import shutil, subprocess
from dataclasses import dataclass, field

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom import uid
from pydicom.dataelem import RawDataElement

from helpers import save_dicom
from radrotator.core import RadRotatorError
from radrotator.ct.read import read_ct

SEED = 5
SERIES = 140
ROWS, COLUMNS = 10, 8
STEP = 2.5                # mm from slice to slice
CORNER = slice(0, 3)      # rows and columns that padding fills
COUNT = 6                 # slices
HAS_DCMTK = bool(shutil.which("dcmj2pnm"))
sitk.ProcessObject.SetGlobalWarningDisplay(False)

# Choices: text as a file holds it; None: the attribute is absent; "": it is there and empty; then the codes of which a
# refusal must have one, nothing where the series is to be read.
ORIENTATIONS = {  # row and column of the picture, LPS
    "1\\0\\0\\0\\1\\0": (), "-1\\0\\0\\0\\1\\0": (), "-1\\0\\0\\0\\-1\\0": (),
    "0\\1\\0\\0\\0\\-1": (), "1\\0\\0\\0\\0\\-1": (),
    "0.984808\\0.173648\\0\\-0.173648\\0.984808\\0": (),
    "1\\0\\0\\0\\0.965926\\-0.258819": (), " 1\\0\\0\\0\\1\\0 ": (),
    None: ("LOCALIZER",), "": ("LOCALIZER",), "1\\0\\0": ("BAD_GEOMETRY",), "a\\0\\0\\0\\1\\0": ("BAD_GEOMETRY",),
    "2\\0\\0\\0\\1\\0": ("BAD_GEOMETRY",), "1\\0\\0\\1\\0\\0": ("BAD_GEOMETRY",), "0\\0\\0\\0\\0\\0": ("BAD_GEOMETRY",),
}
CHOICES = dict(
    PixelSpacing={
        "0.9\\0.7": (), "0.7\\0.7": (), " 1.5\\0.5": (), None: ("LOCALIZER",), "": ("LOCALIZER",),
        "0.9": ("BAD_GEOMETRY",), "a\\b": ("BAD_GEOMETRY",), "0\\0": ("BAD_GEOMETRY",), "-0.9\\-0.7": ("BAD_GEOMETRY",),
        "0.9\\-0.7": ("BAD_GEOMETRY",), "90\\70": ("BAD_GEOMETRY",), "nan\\nan": ("BAD_GEOMETRY",),
    },
    RescaleSlope={"1": (), "2": (), "0.5": (), "1.0e0": (),
                  **dict.fromkeys((None, "", "0", "abc", "1\\2"), ("NOT_HU",))},
    RescaleIntercept={"-1024": (), "0": (), "-8192": (), **dict.fromkeys((None, "", "abc"), ("NOT_HU",))},
    RescaleType={"HU": (), None: (), "": (), "hu": (), **dict.fromkeys(("US", "OD", "ED", "FOO"), ("NOT_HU",))},
    PhotometricInterpretation={"MONOCHROME2": (), "MONOCHROME1": (), "": (), "RGB": ("NOT_HU", "UNREADABLE")},
    Modality={"CT": (), **dict.fromkeys(("MR", "", None), ("NOT_CT",))},
    ImageType={"ORIGINAL\\PRIMARY\\AXIAL": (), None: (), "": (), "ORIGINAL\\PRIMARY\\LOCALIZER": ("LOCALIZER",)},
    SliceThickness={"5": (), None: (), "": (), "0": (), "abc": ()},         # never asked
    InstanceNumber={"1": (), None: (), "": (), "abc": ()},                  # never asked
    NumberOfFrames={None: (), "1": (), "": (), "2": ("MULTI_FRAME",)},
    BitsStored={"as it is": (), None: ("UNREADABLE",), "": ("UNREADABLE",)},
    HighBit={"as it is": (), None: (), "": ()},                             # then it is the usual one
)
LAYOUTS = [(12, 11), (16, 15), (14, 13), (13, 12), (12, 15), (13, 14)]  # bits of a sample, its highest bit, of 16
SYNTAXES = [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless]
TURNED = "0.9\\0.43589\\0\\-0.43589\\0.9\\0"
STACKS = {  # what has become of the slices
    "whole": (), "a gap": ("MISSING_SLICES",), "one twice": ("DUPLICATE_SLICES",), "a copy of a file": (),
    "uneven": ("UNEVEN_SLICES",), "sheared": ("GANTRY_TILT",), "one larger": ("MIXED_SERIES",),
    "one turned": ("MIXED_SERIES", "MISSING_SLICES", "TOO_FEW_SLICES"), "two series": ("MIXED_SERIES",),
    "one without a place": (), "one shifted": ("BAD_GEOMETRY",),
}
KINDS = dict(PhotometricInterpretation="CS", Modality="CS", ImageType="CS", RescaleType="LO", InstanceNumber="IS",
             NumberOfFrames="IS", BitsStored="US", HighBit="US", PixelRepresentation="US", PixelPaddingValue="US")


@dataclass
class Series:
    "A series that was made up."
    texts: dict = field(default_factory=dict)  # attribute → what it says
    codes: set = field(default_factory=set)    # of which a refusal must have one
    layout: tuple = (12, 11)
    signed: bool = False
    padding: str = ""                          # the value's VR, where there is one
    padding_sample: int = 0                    # what stands where nothing was measured
    stack: str = "whole"
    syntax: str = uid.ExplicitVRLittleEndian
    varied: bool = False                       # every slice has a slope and an intercept of its own

    @property
    def is_padded(self): return self.padding in ("US", "SS")

    @property
    def is_for_gdcm(self):
        "GDCM takes samples from the lowest bits only, and ITK turns MONOCHROME1, which is about showing it, over"
        return self.layout[1] == self.layout[0] - 1 and self.texts["PhotometricInterpretation"] != "MONOCHROME1"


def draw(generator, choices, share):
    "The first of some choices, or, in a share of the draws, any"
    names = list(choices)
    return names[generator.integers(len(names))] if generator.random() < share else names[0]


def make_series(generator):
    "Draw a series: most attributes as they should be, some not"
    series = Series()
    for name, choices in (CHOICES | dict(ImageOrientationPatient=ORIENTATIONS)).items():
        share = 0.5 if name == "ImageOrientationPatient" else 0.04 if name in ("BitsStored", "Modality") else 0.15
        series.texts[name] = draw(generator, choices, share)
        series.codes |= set(choices[series.texts[name]])
    series.stack = draw(generator, STACKS, 0.3)
    series.codes |= set(STACKS[series.stack])
    if generator.random() < 0.4: series.layout = LAYOUTS[generator.integers(len(LAYOUTS))]
    if series.texts["HighBit"] != "as it is": series.layout = series.layout[0], series.layout[0] - 1
    series.signed = generator.random() < 0.4
    series.padding = draw(generator, dict.fromkeys(["", "US", "SS", "empty"]), 0.4)
    if generator.random() < 0.3: series.syntax = SYNTAXES[generator.integers(len(SYNTAXES))]
    texts = series.texts
    series.varied = not series.codes and texts["RescaleSlope"] == "1" and generator.random() < 0.5
    if texts["RescaleSlope"] in (None, "") and texts["RescaleIntercept"] in (None, "") and read_as_hu(series):
        series.codes -= {"NOT_HU"}  # by its type, the values are HU as they are
        if texts["PhotometricInterpretation"] == "RGB": series.codes |= {"NOT_HU", "UNREADABLE"}
    stored = [stored_samples(series, scene(k, (ROWS, COLUMNS)), k) for k in range(COUNT)]
    samples = np.array([samples for samples, _ in stored])
    lowest = lowest_sample(series)
    series.padding_sample = lowest if generator.random() < 0.3 else lowest + (1 << series.layout[0]) - 1
    if (samples == series.padding_sample).any(): series.padding = ""  # some tissue has this value, too
    hu = np.array([hu for _, hu in stored])
    if not hu.min() < 0 < hu.max(): series.codes |= {"NOT_HU"}  # as they are stored, no Hounsfield units
    return series


def read_as_hu(series): return series.texts["RescaleType"] in ("HU", "hu")


def number(text, otherwise):
    "The number that a text is, or another"
    try: return float(text)
    except (TypeError, ValueError): return otherwise


def rescale_of(series, k):
    "Slope and intercept of slice k"
    slope = number(series.texts["RescaleSlope"], 1.0) or 1.0
    intercept = number(series.texts["RescaleIntercept"], 0.0)
    return (slope + k % 2, intercept - 8*k) if series.varied else (slope, intercept)


def scene(k, shape):
    "HU of slice k: different in every voxel's neighbourhood, without a symmetry"
    row, column = np.mgrid[:shape[0], :shape[1]]
    return 60 + 300*np.sin(0.9*row + k)*np.cos(0.7*column) - 40*k + 25*column + 3*row


def lowest_sample(series): return -(1 << series.layout[0] - 1) if series.signed else 0


def stored_samples(series, hu, k):
    "What stands for these HU in slice k, as well as its bits can tell; and the HU that this means"
    slope, intercept = rescale_of(series, k)
    bits = series.layout[0]
    low = lowest_sample(series)
    samples = np.clip(np.rint((hu - intercept)/slope), low, low + (1 << bits) - 1).astype(int)
    return samples, samples*slope + intercept


def direction(text, otherwise="1\\0\\0\\0\\1\\0"):
    "Row and column of a picture by its orientation, (2, 3)"
    try: return np.array([float(part) for part in (text or otherwise).split("\\")]).reshape(2, 3)
    except ValueError: return direction(otherwise)


def place_of(series, k):
    "Where slice k lies, LPS mm"
    row, column = direction(series.texts["ImageOrientationPatient"])
    normal = np.cross(row, column)
    if not normal.any(): normal = np.array([0, 0, 1.0])
    off = 0.3*k*k if series.stack == "uneven" else 0
    place = np.array([-30.25, 12.5, -400]) + normal*(STEP*k + off)
    if series.stack == "sheared": place = place + column*0.9*k
    if series.stack == "one shifted" and k == 2: place = place + row*3
    return place


def as_text(values): return "\\".join(f"{value:.6f}".rstrip("0").rstrip(".") for value in values)


def raw(ds, name, text):
    "Write an attribute as raw as it is given"
    if text is None: return
    little = ds.file_meta.TransferSyntaxUID.is_little_endian
    value = text.encode() if isinstance(text, str) else int(text & 0xFFFF).to_bytes(2, "little" if little else "big")
    value += b" "*(len(value) % 2)
    tag = pydicom.tag.Tag(name)
    implicit = ds.file_meta.TransferSyntaxUID.is_implicit_VR
    ds[tag] = RawDataElement(tag, KINDS.get(name, "DS"), len(value), value, 0, implicit, little)


def write_slice(series, k, path, generator, **changed):
    "Write slice k; the HU that its samples mean, padding as air"
    shape = (ROWS + 2, COLUMNS) if changed.get("larger") else (ROWS, COLUMNS)
    samples, hu = stored_samples(series, scene(k, shape), k)
    slope, intercept = rescale_of(series, k)
    stored, high = series.layout
    if series.is_padded:
        padding = series.padding_sample
        samples[CORNER, CORNER] = padding
        hu[CORNER, CORNER] = -1024
    shift = high + 1 - stored
    mask = ((1 << stored) - 1) << shift
    junk = generator.integers(0, 1 << 16, shape) & (0xFFFF - mask)
    if series.is_for_gdcm and series.signed:  # GDCM wants the sign repeated there
        junk = np.where(samples < 0, 0xFFFF - mask, 0)
    cells = (((samples & (1 << stored) - 1) << shift) | junk).astype("<u2")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uid.CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = changed.get("file") or uid.generate_uid()
    ds.SeriesInstanceUID = changed["of"]
    rle = series.syntax == uid.RLELossless
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if rle else series.syntax
    ds.Rows, ds.Columns = shape
    ds.BitsAllocated, ds.SamplesPerPixel = 16, 1
    ds.PixelData = cells.astype("<u2" if ds.file_meta.TransferSyntaxUID.is_little_endian else ">u2").tobytes()
    ds["PixelData"].VR = "OW"
    if rle:
        ds.PixelRepresentation, ds.PhotometricInterpretation, ds.BitsStored, ds.HighBit = 0, "MONOCHROME2", 16, 15
        ds.compress(uid.RLELossless)
    texts = dict(series.texts, PixelRepresentation=int(series.signed))
    texts["ImagePositionPatient"] = as_text(place_of(series, k))
    if series.varied: texts |= dict(RescaleSlope=as_text([slope]), RescaleIntercept=as_text([intercept]))
    if texts["BitsStored"] == "as it is": texts["BitsStored"] = stored
    if texts["HighBit"] == "as it is": texts["HighBit"] = high
    if series.padding == "empty": texts["PixelPaddingValue"] = ""
    elif series.padding: texts["PixelPaddingValue"] = int(padding)
    for name, text in (texts | changed.get("texts", {})).items():
        if name in ds: del ds[name]
        raw(ds, name, text)
    if series.is_padded and not ds.file_meta.TransferSyntaxUID.is_implicit_VR:
        ds["PixelPaddingValue"] = ds.get_item("PixelPaddingValue")._replace(VR=series.padding)
    save_dicom(ds, path)
    return hu


def write_series(series, folder, generator):
    "Write all slices, their names in disorder; of each file that is part of the volume, its HU"
    folder.mkdir()
    names = [f"{i:02d}" for i in generator.permutation(20)]
    first = uid.generate_uid()
    written = {}
    for k in range(COUNT):
        if series.stack == "a gap" and k == 3: continue
        changed = dict(of=uid.generate_uid() if series.stack == "two series" and k > 2 else first)
        if series.stack == "one larger": changed["larger"] = k == 4
        if series.stack == "one turned" and k == 4: changed["texts"] = dict(ImageOrientationPatient=TURNED)
        path = folder/names[k]
        written[path] = write_slice(series, k, path, generator, **changed)
        if series.stack == "a copy of a file" and k == 2: shutil.copy(path, folder/names[-1])
        if series.stack == "one twice" and k == 2: write_slice(series, k, folder/names[-1], generator, **changed)
    if series.stack == "one without a place":
        write_slice(series, 9, folder/names[-1], generator, of=first, texts=dict(ImagePositionPatient=None))
    return written


def voxels_at(ct, points):
    "The voxels of a CT at points (..., 3) in RAS+ mm; where none is, NaN; and how far their centres are off, mm"
    index = (points - ct.affine[:3, 3]) @ np.linalg.inv(ct.affine[:3, :3]).T
    nearest = np.rint(index).astype(int)
    inside = ((nearest >= 0) & (nearest < ct.shape)).all(-1)
    off = np.abs(index - nearest).max()*ct.spacing.max()
    x, y, z = np.moveaxis(np.clip(nearest, 0, np.array(ct.shape) - 1), -1, 0)
    return np.where(inside, ct.hu[x, y, z], np.nan), off


def points_of(series, k, shape):
    "Where the pixels of slice k lie by the standard (PS3.3, C.7.6.2.1.1), (rows, columns, 3) RAS+ mm"
    row, column = direction(series.texts["ImageOrientationPatient"])
    between_rows, between_columns = (float(part) for part in series.texts["PixelSpacing"].split("\\"))
    down, right = np.mgrid[:shape[0], :shape[1]]
    place = np.array([float(part) for part in as_text(place_of(series, k)).split("\\")])
    return (place + right[..., None]*row*between_columns + down[..., None]*column*between_rows)*[-1, -1, 1]


def read_by_gdcm(path):
    "HU (rows, columns) of one file, and where its pixels lie, RAS+ mm; None where it is not read"
    try: image = sitk.ReadImage(str(path), sitk.sitkFloat64, "GDCMImageIO")
    except RuntimeError: return None
    values = sitk.GetArrayFromImage(image)[0]
    down, right = np.mgrid[:values.shape[0], :values.shape[1]]
    axes = np.array(image.GetDirection()).reshape(3, 3)*np.array(image.GetSpacing())
    points = np.array(image.GetOrigin()) + right[..., None]*axes[:, 0] + down[..., None]*axes[:, 1]
    return values, points*[-1, -1, 1]


def read_by_dcmtk(path):
    "What DCMTK shows of one file, from its darkest to its brightest; None where it refuses"
    out = path.with_suffix(".png")
    subprocess.run(["dcmj2pnm", "-q", "+Wm", "+on2", path, out], capture_output=True)
    if not out.exists(): return None
    with Image.open(out) as image: shown = np.asarray(image).astype(float)
    out.unlink()
    return shown


def scale(values): return (values - values.min())/np.ptp(values)


def judge(series, folder, written):
    "What is wrong with how we read a series; an empty text where nothing is"
    try: ct = read_ct(folder)
    except RadRotatorError as error:
        return "" if error.code in series.codes else f"refused, {error.code}: {str(error).replace(str(folder), '')}"
    if series.codes: return "read, though it must be refused"
    if ct.hu.size != len(written)*ROWS*COLUMNS: return f"{ct.hu.size} voxels"
    for k, (path, hu) in enumerate(written.items()):
        found, off = voxels_at(ct, points_of(series, k, hu.shape))
        if off > 0.01: return f"slice {k} is {off:.3f} mm off"
        if not np.allclose(found, np.clip(hu, -1024, 3071), atol=0.01): return f"slice {k} has other values"
        is_shown = np.ones(hu.shape, bool)
        if series.is_padded: is_shown[CORNER, CORNER] = False
        if series.is_for_gdcm: fault = compare_with_gdcm(ct, path, is_shown, series)
        else: fault = compare_with_dcmtk(hu, path, is_shown, series) if k == 0 and HAS_DCMTK else ""
        if fault: return f"slice {k}: {fault}"
    return ""


def compare_with_gdcm(ct, path, is_shown, series):
    theirs = read_by_gdcm(path)
    if theirs is None: return "" if series.syntax == uid.RLELossless else "not read by GDCM"  # of RLE it reads most
    values, points = theirs
    found, off = voxels_at(ct, points)
    if off > 0.01: return f"{off:.3f} mm off from where GDCM has it"
    worst = np.abs(found - np.clip(values, -1024, 3071))[is_shown].max()
    return "" if worst < 0.01 else f"differs by {worst:.1f} HU from GDCM"


def compare_with_dcmtk(hu, path, is_shown, series):
    theirs = read_by_dcmtk(path)
    if theirs is None: return "not read by DCMTK" if series.texts["PhotometricInterpretation"] else ""
    if series.texts["PhotometricInterpretation"] == "MONOCHROME1": theirs = -theirs
    worst = np.abs(scale(hu[is_shown]) - scale(theirs[is_shown])).max()
    return "" if worst < 0.01 else f"differs by {worst:.3f} from DCMTK"


def test_series_are_read_as_gdcm_reads_them_or_refused(tmp_path):
    generator = np.random.default_rng(SEED)
    faults, read, refused = [], 0, set()
    for i in range(SERIES):
        series = make_series(generator)
        folder = tmp_path/str(i)
        fault = judge(series, folder, write_series(series, folder, generator))
        if fault: faults.append(f"{i}: {fault}: {series}")
        read += not series.codes
        refused |= series.codes
    assert not faults, "\n".join(faults)
    assert read > SERIES/5 and len(refused) > 8, (read, refused)
