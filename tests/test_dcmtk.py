"""Some hundreds of made-up headers, each attribute absent, empty, odd or as it should be, read by DCMTK and by us: the
same grey values, or a refusal that names the attribute."""
import shutil, subprocess, warnings
from dataclasses import dataclass, field

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataelem import RawDataElement

from helpers import make_item, save_dicom
from radrotator.core import RadRotatorError
from radrotator.radiograph.read import read_radiograph

HEIGHT, WIDTH = 40, 32
ROW, COLUMN = np.mgrid[:HEIGHT, :WIDTH]
SCENE = 2000 + 1200*np.sin(ROW/7)*np.cos(COLUMN/5) + 15*COLUMN  # 12 bits, without a symmetry
PADDED = slice(0, 5)  # rows
SEED = 20
FILES = 300

# What an attribute may say: text and numbers as a file holds them; None: it is absent; "": it is there and empty.
LAYOUTS = [(16, 12, 11), (16, 12, 15), (16, 16, 15), (16, 14, 13), (16, 10, 9), (8, 8, 7), (16, 13, 14)]
SYNTAXES = [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless]
CHOICES = dict(
    PhotometricInterpretation=[*["MONOCHROME1", "MONOCHROME2"]*2, "MONOCHROME1 ", None, "", "HSV", "MONOCHROME3"],
    PresentationLUTShape=["IDENTITY", "INVERSE", "", "SHAPE", "LIN OD"],
    RescaleSlope=["1", "1.0", "", "0", "abc"],
    RescaleIntercept=["0", "", "0.0", "-1024", "abc"],
    RescaleType=["US", "HU", "", "OD"],
    WindowCenter=["1900", "1900\\50", "1900.5", "-200", "", "abc", "1900\\", "1e3", " 2100 "],
    WindowWidth=["1201", "1201\\9", "1", "0", "-500", "", "abc", "3000.5", "2"],
    VOILUTFunction=["LINEAR", "SIGMOID", "LINEAR_EXACT", "", "FOO"],
    PixelSpacing=["0.2\\0.2", "0.4\\0.2", "0\\0", "", "0.2", "abc\\abc"],
    ImagerPixelSpacing=["0.15\\0.15", "", "0"],
    PixelAspectRatio=["1\\1", "2\\1", "", "0\\0", "1"],
    NumberOfFrames=["1", "", "1 ", None],
    PixelPaddingValue=["", 0, 65535, 4095, 100],
    PixelRepresentation=[1],
    BitsStored=[None, ""],
    HighBit=[None, ""],
    SamplesPerPixel=[None, ""],
)
DECIDING = "BitsStored", "HighBit", "SamplesPerPixel", "PixelRepresentation"  # without them there are no samples
KINDS = dict(
    PhotometricInterpretation="CS", PresentationLUTShape="CS", VOILUTFunction="CS", RescaleType="LO",
    PixelAspectRatio="IS", NumberOfFrames="IS", PixelPaddingValue="US", PixelRepresentation="US", BitsStored="US",
    HighBit="US", SamplesPerPixel="US",
)  # all others are DS
LINES = [("2", "-1024"), ("3", "100"), ("-1", "4095"), ("-2", "-2048"), ("1", "-1024")]  # DCMTK rounds to whole numbers
CURVE = np.rint(250*np.sqrt(np.arange(4096))).astype("<u2")


@dataclass
class Case:
    "A header that was made up."
    layout: tuple = (16, 12, 11)                     # bits of a cell, bits of a sample, its highest bit
    syntax: str = uid.ExplicitVRLittleEndian
    texts: dict = field(default_factory=dict)        # attribute → what it says
    tables: dict = field(default_factory=dict)       # "ModalityLUTSequence", "VOILUTSequence" → items

    def get(self, name, default=None): return self.texts.get(name, default)


def make_table(generator, signed):
    "An item with a lookup table, whole or without its parts, of any VR"
    form = generator.integers(7)
    if form == 0: return []
    if form == 1: return [make_item()]
    first = -2048 if signed else int(generator.choice([0, 100]))
    kind = str(generator.choice(["US", "SS"]))
    item = make_item()
    numbers = [4096, first & 0xFFFF, 16] if kind == "US" else [4096, first, 16]
    item.add_new("LUTDescriptor", kind, None if form == 2 else numbers)
    if form < 5: item.add_new("LUTData", "OW", CURVE.tobytes())
    else: item.add_new("LUTData", "US", CURVE.tolist())  # DCMTK does not read SS, which is against the standard
    return [item]


def make_case(generator):
    "Draw a header: most attributes as they should be, some not"
    case = Case(texts=dict(PhotometricInterpretation="MONOCHROME2", PixelRepresentation=0, SamplesPerPixel=1))
    if generator.random() < 0.3: case.layout = LAYOUTS[generator.integers(len(LAYOUTS))]
    if generator.random() < 0.3: case.syntax = SYNTAXES[generator.integers(len(SYNTAXES))]
    case.texts |= dict(BitsStored=case.layout[1], HighBit=case.layout[2])
    for name, choices in CHOICES.items():
        share = 0.04 if name in DECIDING else 0.25
        if generator.random() < share: case.texts[name] = choices[generator.integers(len(choices))]
    if generator.random() < 0.3:
        case.texts["RescaleSlope"], case.texts["RescaleIntercept"] = generator.choice(LINES).tolist()
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        signed = case.texts["PixelRepresentation"] == 1 and name == "ModalityLUTSequence"
        if generator.random() < 0.12: case.tables[name] = make_table(generator, signed)
    return case


def stored_cells(case, generator):
    "The scene in its cells, the bits around the samples filled with anything; and the pixels that are no padding"
    allocated, stored, high = case.layout
    samples = np.rint(SCENE/4095*(2**min(stored, 12) - 1)).astype(np.int64)
    samples[PADDED] = 0
    if case.get("PixelRepresentation") == 1: samples[PADDED.stop:] -= 2**(min(stored, 12) - 1)
    bits = (samples & (2**stored - 1)) << (high + 1 - stored)
    mask = (2**stored - 1) << (high + 1 - stored)
    junk = generator.integers(0, 2**allocated, samples.shape) & (2**allocated - 1 - mask)
    padding = case.get("PixelPaddingValue")
    shown = (samples - padding) % 2**stored != 0 if isinstance(padding, int) else np.ones(samples.shape, bool)
    return (bits | junk).astype(f"<u{allocated//8}"), shown


def write_case(case, path, generator):
    "Write the file, its attributes as raw as they are given; the pixels that are no padding"
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if case.syntax == uid.RLELossless else case.syntax
    little = ds.file_meta.TransferSyntaxUID.is_little_endian
    cells, shown = stored_cells(case, generator)
    ds.Modality = "DX"
    ds.Rows, ds.Columns = cells.shape
    ds.BitsAllocated = case.layout[0]
    ds.PixelData = cells.astype(cells.dtype.newbyteorder("<" if little else ">")).tobytes()
    ds["PixelData"].VR = "OW" if cells.itemsize > 1 or not little else "OB"
    for name, items in case.tables.items(): setattr(ds, name, pydicom.Sequence(items))
    if case.syntax == uid.RLELossless:
        ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 0, "MONOCHROME2"
        ds.BitsStored, ds.HighBit = case.layout[0], case.layout[0] - 1
        ds.compress(uid.RLELossless)
        for name in (*DECIDING, "PhotometricInterpretation"): del ds[name]
    for name, text in case.texts.items():
        if text is None: continue
        value = text.encode() if isinstance(text, str) else int(text).to_bytes(2, "little" if little else "big")
        value += b" "*(len(value) % 2)
        tag = pydicom.tag.Tag(name)
        implicit = ds.file_meta.TransferSyntaxUID.is_implicit_VR
        ds[tag] = RawDataElement(tag, KINDS.get(name, "DS"), len(value), value, 0, implicit, little)
    save_dicom(ds, path)
    return shown


def has_table(items):
    "Whether an item holds a whole table"
    return any(item.get("LUTDescriptor") and item.get("LUTData") for item in items)


def read_by_dcmtk(path, tables):
    "What DCMTK shows, 16 bits: by the file's VOI LUT, else by its first window, else without; None where it refuses"
    by_table = [["+Wl", "1"]] if has_table(tables.get("VOILUTSequence", [])) else []
    for way in [*by_table, ["+Wi", "1"], []]:
        out = path.with_suffix(".png")
        out.unlink(missing_ok=True)
        subprocess.run(["dcmj2pnm", "-q", *way, "+on2", path, out], capture_output=True)
        if out.exists():
            with Image.open(out) as image: return np.asarray(image).astype(float)
    return None


def read_by_us(path):
    "What we show and say: pixels or None; the refusal; the warnings"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try: pixels, refusal = read_radiograph(path).pixels, ""
        except RadRotatorError as error: pixels, refusal = None, str(error).replace(str(path), "")
    return pixels, refusal, " ".join(str(one.message).replace(str(path), "") for one in seen)


def wrong_attributes(case):
    "Attributes that decide the values and are wrong, by the standard: a refusal must name one of them"
    slope, intercept = (case.get(name) or None for name in ("RescaleSlope", "RescaleIntercept"))
    wrong = [name for name in DECIDING if case.get(name) in (None, "")]
    if case.get("PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME1 ", "MONOCHROME2"):
        wrong.append("PhotometricInterpretation")
    if slope in ("0", "abc") or (slope is None and intercept): wrong.append("RescaleSlope")
    if intercept == "abc" or (intercept is None and slope): wrong.append("RescaleIntercept")
    return wrong


def contradicts_itself(case):
    "Whether two attributes say the opposite of what is bright"
    pair = (case.get("PhotometricInterpretation") or "").strip(), case.get("PresentationLUTShape")
    return pair in (("MONOCHROME2", "INVERSE"), ("MONOCHROME1", "IDENTITY"))


def scale(values): return (values - values.min())/np.ptp(values)


def judge(case, path, shown):
    "What is wrong with how we read a file, compared with DCMTK; an empty text where nothing is"
    ours, refusal, said = read_by_us(path)
    if ours is None: return "" if any(name in refusal for name in wrong_attributes(case)) else f"refused: {refusal}"
    theirs = read_by_dcmtk(path, case.tables)
    if theirs is None: return "" if case.get("SamplesPerPixel") in (None, "") else "read, but not by DCMTK"
    if contradicts_itself(case):  # DCMTK follows the shape, others do not: it must be said
        if "contradict" not in said: return "a contradiction without a word"
        theirs = -theirs
    if (ours[~shown] > 0).any(): return "padding is not dark"
    if np.ptp(theirs[shown]) == 0: return "" if "even grey" in said else "a window that leaves nothing, without a word"
    worst = np.abs(scale(ours[shown]) - scale(theirs[shown])).max()
    return "" if worst <= 1/255 else f"differs by {worst:.3f}"


@pytest.mark.skipif(not shutil.which("dcmj2pnm"), reason="DCMTK (Debian: dcmtk) is not here to compare headers with")
def test_headers_read_as_dcmtk_reads_them(tmp_path):
    generator = np.random.default_rng(SEED)
    path = tmp_path/"a.dcm"
    faults, read = [], 0
    for number in range(FILES):
        case = make_case(generator)
        shown = write_case(case, path, generator)
        fault = judge(case, path, shown)
        if fault: faults.append(f"{number}: {fault}: {case}")
        read += not wrong_attributes(case)
    assert not faults, "\n".join(faults)
    assert read > FILES/2
