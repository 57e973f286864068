"""Radiographs that were read wrong once, and others of their kind: each with its right value, by formula, by another
library, or by the same picture stored in a way that nobody misreads."""
import gzip, io, struct, warnings, zipfile, zlib
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pydicom.fileset
import pytest
import tifffile
from PIL import Image
from pydicom import uid
from pydicom.dataelem import RawDataElement

from helpers import make_dicom, make_item, make_sequence, save_dicom
from radrotator.core import RadRotatorError, RadRotatorWarning
from radrotator.radiograph.image import Radiograph, resize
from radrotator.radiograph.read import read_radiograph
from radrotator.rotate.rotator import RadRotator

HEIGHT, WIDTH = 96, 80
ROW, COLUMN = np.mgrid[:HEIGHT, :WIDTH]
VALUES = 900 + 500*np.sin(ROW/13)*np.cos(COLUMN/11)
VALUES[30:80, 10:28] += 1800                                    # a block on the left
VALUES[(ROW - 28)**2 + (COLUMN - 58)**2 < 130] += 1300           # a disc on the right, and higher
SCENE = np.rint(np.clip(VALUES, 200, 3800)).astype(np.uint16)    # 12 bits, bone bright
CASES = dict(bits=12)


def unit(values):
    "What a picture must read as: between its smallest and its largest value"
    values = np.asarray(values, float)
    return (values - values.min())/(values.max() - values.min())


def write(path, stored=SCENE, change=lambda ds: None, **options):
    "A DICOM file of stored values, changed before it is written; its path"
    ds = make_dicom(stored, **CASES | options)
    if "stream" not in options: ds["PixelData"].VR = "OW"  # pydicom would ask for BitsAllocated, which may be spoilt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(ds)
    return save_dicom(ds, path)


def set_raw(ds, name, value, kind="DS"):
    "Write the bytes of a value as they are, whatever DICOM thinks of them"
    tag = pydicom.tag.Tag(name)
    value += b" "*(len(value) % 2)
    ds[tag] = RawDataElement(tag, kind, len(value), value, 0, False, True)


def read_with_words(path, **options):
    "A radiograph, and what was said of it"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        radiograph = read_radiograph(path, **options)
    return radiograph, [str(one.message) for one in seen if issubclass(one.category, RadRotatorWarning)]


def check(path, expected=unit(SCENE), atol=1e-5, words=0):
    "A file that must read as the expected picture, with so many sentences; the radiograph"
    radiograph, said = read_with_words(path)
    assert radiograph.shape == expected.shape
    assert np.abs(radiograph.pixels - expected).max() <= atol
    assert len(said) == words, said
    return radiograph


def check_refused(path, name):
    "A file that must be refused in one sentence that names an attribute"
    with pytest.raises(RadRotatorError) as caught: read_radiograph(path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# ---- where a sample lies in its cell ---------------------------------------------------------------------------------

CODECS = {
    "raw": {},
    "implicit": dict(syntax=uid.ImplicitVRLittleEndian),
    "big endian": dict(syntax=uid.ExplicitVRBigEndian),
    "deflated": dict(syntax=uid.DeflatedExplicitVRLittleEndian),
    "RLE": dict(compress=uid.RLELossless),
    "JPEG 2000": dict(syntax=uid.JPEG2000Lossless, encode=lambda cells: imagecodecs.jpeg2k_encode(
        cells, level=0, codecformat="j2k", reversible=True)),
    "HTJ2K": dict(syntax=uid.HTJ2KLossless, encode=lambda cells: imagecodecs.htj2k_encode(cells, reversible=True)),
    "JPEG-LS": dict(syntax=uid.JPEGLSLossless, encode=imagecodecs.jpegls_encode),
    "JPEG lossless": dict(syntax=uid.JPEGLosslessSV1, encode=lambda cells: imagecodecs.jpeg8_encode(
        cells, lossless=True, bitspersample=16)),
}


def write_cells(path, codec, cells, bits=12, high=11, signed=False, **header):
    "A file of whole cells, by one of the codecs; its path"
    options = dict(CODECS[codec])
    encode = options.pop("encode", None)
    squeeze = options.pop("compress", None)
    if encode: options["stream"] = encode(cells)
    ds = make_dicom(cells, bits=16, **options)
    if squeeze: ds.compress(squeeze)
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, high, int(signed)
    for name, value in header.items(): setattr(ds, name, value)
    return save_dicom(ds, path)


@pytest.mark.parametrize("codec", CODECS)
def test_samples_at_the_top_of_their_cells(tmp_path, codec):
    check(write_cells(tmp_path/"a.dcm", codec, SCENE << 4, high=15))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("signed", [False, True])
def test_bits_above_a_sample_have_no_say(tmp_path, codec, signed):
    "An overlay in bit 12, and anything in the bits above"
    samples = (SCENE.astype(np.int16) - 2048*signed).view(np.uint16) & 0xFFF
    junk = np.random.default_rng(0).integers(0, 16, SCENE.shape).astype(np.uint16)
    check(write_cells(tmp_path/"a.dcm", codec, samples | junk << 12, signed=signed))


@pytest.mark.parametrize("codec", CODECS)
def test_signed_cells(tmp_path, codec):
    cells = (SCENE.astype(np.int16) - 2048).view(np.uint16)
    check(write_cells(tmp_path/"a.dcm", codec, cells, signed=True))


def test_a_signed_stream_is_as_good(tmp_path):
    "JPEG 2000 knows a sign of its own; the header's counts, and the bits are the same"
    cells = SCENE.astype(np.int16) - 2048
    stream = imagecodecs.jpeg2k_encode(cells, level=0, codecformat="j2k", reversible=True)
    options = dict(stream=stream, syntax=uid.JPEG2000Lossless, bits=16)
    check(write(tmp_path/"a.dcm", cells, PixelRepresentation=1, **options))
    check(write(tmp_path/"a.dcm", cells, PixelRepresentation=0, **options), unit(cells.view(np.uint16)))


def test_what_a_lossy_stream_overshoots_is_white(tmp_path):
    "Not black, as its lower bits are"
    bright = SCENE.copy()
    bright[5:10] = 4200  # beyond 12 bits
    stream = imagecodecs.jpeg2k_encode(bright, level=0, codecformat="j2k", reversible=True)
    path = write(tmp_path/"a.dcm", stream=stream, syntax=uid.JPEG2000)
    check(path, unit(bright.clip(0, 4095)))


@pytest.mark.parametrize("header", [
    dict(HighBit=5), dict(HighBit=16), dict(BitsStored=17), dict(BitsStored=0), dict(BitsAllocated=12),
    dict(PixelRepresentation=2), dict(SamplesPerPixel=3), dict(PixelRepresentation=None), dict(BitsStored=None),
    dict(BitsAllocated=None),
    dict(PhotometricInterpretation=None), dict(PhotometricInterpretation="MONOCHROME3"),
], ids=str)
def test_headers_that_put_samples_nowhere(tmp_path, header):
    name, = header
    check_refused(write(tmp_path/"a.dcm", change=lambda ds: setattr(ds, name, header[name])), name)


@pytest.mark.parametrize("name", ["HighBit", "SamplesPerPixel", "NumberOfFrames"])
def test_what_others_say_already_may_be_missing(tmp_path, name):
    check(write(tmp_path/"a.dcm", change=lambda ds: setattr(ds, name, None)))
    check(write(tmp_path/"a.dcm", change=lambda ds: ds.pop(name, None)))


def test_other_depth_in_the_stream_than_in_the_header(tmp_path):
    stream = imagecodecs.jpegls_encode(SCENE)
    with pytest.raises(RadRotatorError): read_radiograph(
        write(tmp_path/"a.dcm", (SCENE >> 4).astype(np.uint8), bits=8, stream=stream, syntax=uid.JPEGLSLossless))
    path = write(tmp_path/"a.dcm", change=lambda ds: (setattr(ds, "BitsAllocated", 8), setattr(ds, "BitsStored", 8),
                                                      setattr(ds, "HighBit", 7)))
    with pytest.raises(RadRotatorError): read_radiograph(path)  # twice as many bytes as it says


# ---- the end of a stream ---------------------------------------------------------------------------------------------

STREAMS = {
    "lossless": (lambda: imagecodecs.jpeg8_encode(SCENE, lossless=True, bitspersample=16), uid.JPEGLosslessSV1),
    "JPEG-LS": (lambda: imagecodecs.jpegls_encode(SCENE), uid.JPEGLSLossless),
    "JPEG 2000": (
        lambda: imagecodecs.jpeg2k_encode(SCENE, level=0, codecformat="j2k", reversible=True),
        uid.JPEG2000Lossless,
    ),
}


@pytest.mark.parametrize("behind", [b"\xff", b"\0", b"\xff\xff\xff", b"\0\0\0\xff", b"anything at all"], ids=str)
@pytest.mark.parametrize("kind", STREAMS)
def test_bytes_behind_a_stream_are_no_damage(tmp_path, kind, behind):
    encode, syntax = STREAMS[kind]
    check(write(tmp_path/"a.dcm", stream=encode() + behind, syntax=syntax))


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_is_cut_short_is_refused(tmp_path, kind):
    encode, syntax = STREAMS[kind]
    for end in (b"", b"\0\0", b"\xff"):
        path = write(tmp_path/"a.dcm", stream=encode()[:-300] + end, syntax=syntax)
        with pytest.raises(RadRotatorError): read_radiograph(path)


def test_jpeg_2000_without_its_last_mark(tmp_path):
    "The length of its parts says that nothing is missing"
    encode, syntax = STREAMS["JPEG 2000"]
    check(write(tmp_path/"a.dcm", stream=encode()[:-2], syntax=syntax))


def test_pydicoms_own_lossy_file(tmp_path):
    "One 0xFF behind the end; the values are those of GDCM in pydicom's tests: 0 to 264"
    ds = pydicom.dcmread(Path(pydicom.__file__).parent/"data"/"test_files"/"JPEG-lossy.dcm")
    ds.Modality = "DX"
    ds.save_as(tmp_path/"a.dcm")
    stored = imagecodecs.jpeg8_decode(next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1)))
    assert (stored.shape, stored.min(), stored.max()) == ((1024, 256), 0, 264)
    for name in ("WindowCenter", "WindowWidth"): ds.pop(name, None)
    ds.save_as(tmp_path/"a.dcm")
    check(tmp_path/"a.dcm", unit(stored))


def test_a_jpeg_picture_with_bytes_behind_it(tmp_path):
    Image.fromarray((SCENE >> 4).astype(np.uint8)).save(tmp_path/"a.jpg", quality=98)
    whole = read_radiograph(tmp_path/"a.jpg").pixels
    for name, data in (("a.jpg", (tmp_path/"a.jpg").read_bytes()), ("b.jpg", STREAMS["lossless"][0]())):
        (tmp_path/name).write_bytes(data + b"\xff\0\xff")
        expected = whole if name == "a.jpg" else unit(SCENE)
        assert np.allclose(read_radiograph(tmp_path/name).pixels, expected, atol=1e-5)


# ---- values that are absent, empty or odd ----------------------------------------------------------------------------

EMPTY = """
RescaleSlope RescaleIntercept RescaleType WindowCenter WindowWidth VOILUTFunction PresentationLUTShape PixelSpacing
ImagerPixelSpacing PixelAspectRatio PixelPaddingValue PixelPaddingRangeLimit NumberOfFrames PatientOrientation
PixelIntensityRelationshipSign VOILUTSequence ModalityLUTSequence ImageType
""".split()
WINDOW = dict(WindowCenter=2048, WindowWidth=4096)


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_attribute_is_an_absent_one(tmp_path, name, syntax):
    empty = [] if "Sequence" in name else None
    path = write(tmp_path/"a.dcm", syntax=syntax, change=lambda ds: setattr(ds, name, empty))
    assert check(path).source == "DICOM DX; pixel spacing unknown"


def test_all_of_them_empty(tmp_path):
    check(write(tmp_path/"a.dcm", **{name: [] if "Sequence" in name else None for name in EMPTY}))


@pytest.mark.parametrize("function", ["", None, "LINEAR", "linear", " LINEAR "])
def test_an_empty_function_is_linear(tmp_path, function):
    check(write(tmp_path/"a.dcm", VOILUTFunction=function, **WINDOW))


def test_an_unknown_function_is_said(tmp_path):
    check(write(tmp_path/"a.dcm", VOILUTFunction="CUBIC", **WINDOW), words=1)


def test_rescale_that_is_empty_or_half(tmp_path):
    check(write(tmp_path/"a.dcm", RescaleSlope=None, RescaleIntercept=None, **WINDOW))
    for harmless in (dict(RescaleSlope=1), dict(RescaleIntercept=0)):
        check(write(tmp_path/"a.dcm", **WINDOW, **harmless))
    for name, half in (("RescaleIntercept", dict(RescaleSlope=-1)), ("RescaleSlope", dict(RescaleIntercept=-1024))):
        check_refused(write(tmp_path/"a.dcm", **WINDOW, **half), name)
    check_refused(write(tmp_path/"a.dcm", RescaleSlope=0, RescaleIntercept=0), "RescaleSlope")
    def spoil(ds): set_raw(ds, "RescaleSlope", b"slope")
    check_refused(write(tmp_path/"a.dcm", change=spoil, RescaleIntercept=0), "RescaleSlope")


def test_a_negative_slope_turns_the_picture_round(tmp_path):
    check(write(tmp_path/"a.dcm", RescaleSlope=-1, RescaleIntercept=4095), 1 - unit(SCENE))


@pytest.mark.parametrize("text, mm", [
    (rb"0,143\0,143", 0.143), (rb"0,143\0.143", 0.143), (rb"1,43e-1\1,43e-1", 0.143),
    (rb"0,1,43\0,143", None), (b"wide", None),
])
def test_a_comma_is_a_decimal_mark(tmp_path, text, mm):
    read = check(write(tmp_path/"a.dcm", change=lambda ds: set_raw(ds, "PixelSpacing", text)))
    assert read.spacing == (mm and (mm, mm))


def test_a_comma_in_what_decides_the_values(tmp_path):
    def spoil(ds):
        set_raw(ds, "WindowCenter", b"1900,5")
        set_raw(ds, "WindowWidth", b"1201,0")
    check(write(tmp_path/"a.dcm", change=spoil), unit(np.clip((SCENE - 1900.0)/1200 + 0.5, 0, 1)))


def test_of_several_windows_the_first(tmp_path):
    path = write(tmp_path/"a.dcm", WindowCenter=[1900, 700, 5], WindowWidth=[1201, 100, 10])
    check(path, unit(np.clip((SCENE - 1899.5)/1200 + 0.5, 0, 1)))
    path = write(tmp_path/"a.dcm", change=lambda ds: set_raw(ds, "WindowCenter", b"1900\\"), WindowWidth=[1201, 9])
    check(path, unit(np.clip((SCENE - 1899.5)/1200 + 0.5, 0, 1)))
    check(write(tmp_path/"a.dcm", WindowCenter=[-9000, 1900], WindowWidth=[100, 1201]), words=1)  # leaves one grey


# ---- lookup tables ---------------------------------------------------------------------------------------------------

CURVE = np.rint(np.sqrt(np.arange(4096))*1000).astype("<u2")
CURVED = unit(np.rint(1000*np.sqrt(SCENE.astype(float))))
SIGNED = SCENE.astype(np.int16) - 2048


def make_table(descriptor, data, kind="US", data_kind="US"):
    "A sequence with one table, of any value representation"
    item = make_item()
    item.add_new("LUTDescriptor", kind, descriptor)
    item.add_new("LUTData", data_kind, data)
    return [item]


FORMS = {  # of the same table: a descriptor and its VR, data and their VR
    "all SS": ([4096, -2048, 16], CURVE.view("<i2").tolist(), "SS", "SS"),
    "first as US": ([4096, 63488, 16], CURVE.tolist(), "US", "US"),
    "bytes": ([4096, -2048, 16], CURVE.tobytes(), "SS", "OW"),
    "first as US, bytes": ([4096, 63488, 16], CURVE.tobytes(), "US", "OW"),
    "65,536 entries": ([0, -2048, 16], np.pad(CURVE, (0, 61440), "edge").tobytes(), "SS", "OW"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_entries_are_unsigned_and_the_first_input_has_the_pixels_sign(tmp_path, sequence, form):
    table = make_table(*FORMS[form])
    check(write(tmp_path/"a.dcm", SIGNED, PixelRepresentation=1, **{sequence: table}), CURVED)


def test_a_first_input_written_with_a_sign_where_none_is_possible(tmp_path):
    high = SCENE + 50000
    table = make_table([4096, 50000 - 65536, 16], CURVE.tolist(), "SS", "US")
    check(write(tmp_path/"a.dcm", high.astype(np.uint16), bits=16, VOILUTSequence=table), CURVED)


def test_a_table_behind_an_intercept(tmp_path):
    "Stored values are unsigned, and those that the table sees are not"
    table = make_table([4096, 63488, 16], CURVE.tolist())
    check(write(tmp_path/"a.dcm", RescaleSlope=1, RescaleIntercept=-2048, VOILUTSequence=table), CURVED)


def test_entries_of_eight_bits(tmp_path):
    curve = np.rint(255*(np.arange(256)/255)**2).astype(np.uint8)
    stored = (SCENE >> 4).astype(np.uint8)
    words = curve.view("<u2").tolist()
    for data, kind in ((curve.tobytes(), "OW"), (words, "US"), (curve.tolist(), "US")):
        table = make_table([256, 0, 8], data, data_kind=kind)
        check(write(tmp_path/"a.dcm", stored, bits=8, VOILUTSequence=table), unit(curve[stored]))


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_tables_in_other_orders_of_bytes(tmp_path, syntax):
    data = CURVE.astype(">u2" if syntax == uid.ExplicitVRBigEndian else "<u2").tobytes()
    table = make_table([4096, 0, 16], data, data_kind="OW")
    check(write(tmp_path/"a.dcm", syntax=syntax, VOILUTSequence=table), CURVED)


HOLLOW = {
    "no item": [],
    "empty item": [make_item()],
    "no values": make_table(None, None, "SS", "OW"),
    "no data": make_table([4096, 0, 16], None),
    "no descriptor": make_table(None, CURVE.tolist()),
}


@pytest.mark.parametrize("table", HOLLOW)
@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_an_item_without_a_table_is_none(tmp_path, sequence, table):
    narrow = dict(WindowCenter=1900, WindowWidth=1201)
    path = write(tmp_path/"a.dcm", **{sequence: HOLLOW[table]}, **narrow)
    check(path, unit(np.clip((SCENE - 1899.5)/1200 + 0.5, 0, 1)))


def test_a_table_that_is_too_short_is_refused(tmp_path):
    for descriptor, name in (([4096, 0, 16], "LUTData"), ([4096, 0], "LUTDescriptor")):
        table = make_table(descriptor, CURVE[:100].tolist())
        check_refused(write(tmp_path/"a.dcm", VOILUTSequence=table), name)


def test_fluoroscopy_is_shown_without_its_modality_table(tmp_path):
    "PS3.4, N.2.1.2: it leads to the beam's intensity, not to what is shown"
    table = make_table([4096, 0, 16], CURVE[::-1].tolist())
    check(write(tmp_path/"a.dcm", modality="RF", ModalityLUTSequence=table))
    check(write(tmp_path/"a.dcm", modality="DX", ModalityLUTSequence=table), unit(CURVE[::-1][SCENE].astype(float)))


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes(tmp_path, bits):
    "A palette of greys that rises, and one that does not begin at 0"
    levels = np.linspace(0, 2**bits - 1, 200).astype(f"<u{bits//8}")
    stored = (SCENE//20 + 5).astype(np.uint8)
    palette = {}
    for colour in ("Red", "Green", "Blue"):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [200, 5, bits]
        palette[f"{colour}PaletteColorLookupTableData"] = levels.tobytes()
    options = dict(bits=8, PhotometricInterpretation="PALETTE COLOR")
    path = write(tmp_path/"a.dcm", stored, **options, **palette)
    check(path, unit(levels[stored.astype(int) - 5].astype(float)))
    del palette["RedPaletteColorLookupTableData"]
    check_refused(write(tmp_path/"a.dcm", stored, **options, **palette), "palette")


# ---- padding ---------------------------------------------------------------------------------------------------------

def padded(first, dtype=np.uint16, offset=0):
    "The scene with 12 rows of padding on top; what it must read as"
    stored = (SCENE.astype(int) + offset).astype(dtype)
    stored[:12] = first
    expected = np.zeros(SCENE.shape)
    expected[12:] = unit(SCENE[12:])
    return stored, expected


PADDINGS = {  # value in the pixels, their type, bits and offset; the attribute's VR and value
    "signed, as US": (-5000, np.int16, 16, -2048, "US", 60536),
    "signed, as SS": (-5000, np.int16, 16, -2048, "SS", -5000),
    "unsigned, as SS": (65535, np.uint16, 16, 0, "SS", -1),
    "12 bits signed, as US of 16 bits": (-2048, np.int16, 12, -2048, "US", 63488),
    "12 bits signed, as US of 12 bits": (-2048, np.int16, 12, -2048, "US", 2048),
    "12 bits, as 65535": (4095, np.uint16, 12, 0, "US", 65535),
}


@pytest.mark.parametrize("name", PADDINGS)
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_padding_of_any_sign(tmp_path, name, photometric):
    value, dtype, bits, offset, kind, written = PADDINGS[name]
    stored, expected = padded(value, dtype, offset)
    options = dict(bits=bits, PixelRepresentation=int(dtype is np.int16), PhotometricInterpretation=photometric)
    path = write(tmp_path/"a.dcm", stored, change=lambda ds: ds.add_new("PixelPaddingValue", kind, written), **options)
    if photometric == "MONOCHROME1": expected[12:] = 1 - expected[12:]
    check(path, expected)


def test_a_range_of_padding_across_the_sign(tmp_path):
    stored, expected = padded(0, np.int16, -2048)
    stored[:12] = np.linspace(-6000, -5000, 12)[:, None]
    def change(ds):
        ds.add_new("PixelPaddingValue", "US", 60536)       # -5000
        ds.add_new("PixelPaddingRangeLimit", "SS", -6000)
    check(write(tmp_path/"a.dcm", stored, change=change, bits=16, PixelRepresentation=1), expected)


def test_padding_does_not_save_a_window_that_leaves_nothing(tmp_path):
    stored, expected = padded(0)
    check(write(tmp_path/"a.dcm", stored, PixelPaddingValue=0, WindowCenter=50, WindowWidth=60), expected, words=1)


# ---- polarity --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", [None, "", "IDENTITY", "INVERSE", "identity", "LIN OD"])
def test_what_is_bright_is_said_once_or_twice(tmp_path, photometric, shape):
    "Both may say it, or one; where they contradict each other it is said, and the first is followed"
    path = write(tmp_path/"a.dcm", PhotometricInterpretation=photometric, PresentationLUTShape=shape)
    same = dict(MONOCHROME1="INVERSE", MONOCHROME2="IDENTITY")[photometric]
    contradicts = (shape or "").upper() in {"IDENTITY", "INVERSE"} - {same}
    check(path, unit(SCENE) if photometric == "MONOCHROME2" else 1 - unit(SCENE), words=int(contradicts))


@pytest.mark.parametrize("photometric, sign, words", [
    ("MONOCHROME2", -1, 0), ("MONOCHROME2", 1, 1), ("MONOCHROME1", 1, 0), ("MONOCHROME1", -1, 1), ("MONOCHROME2", 0, 0),
])
def test_a_header_that_says_that_bone_is_dark(tmp_path, photometric, sign, words):
    "Stored values that rise with the beam are bright in air; inverted on request"
    path = write(tmp_path/"a.dcm", PhotometricInterpretation=photometric, PixelIntensityRelationshipSign=sign)
    expected = unit(SCENE) if photometric == "MONOCHROME2" else 1 - unit(SCENE)
    check(path, expected, words=words)
    assert np.allclose(read_with_words(path, invert=True)[0].pixels, 1 - expected, atol=1e-5)


# ---- spacing and shape of a pixel ------------------------------------------------------------------------------------

DETECTOR = dict(ImagerPixelSpacing=[0.15, 0.15])
REPEATED = DETECTOR | dict(PixelSpacing=[0.15, 0.15])
SPACINGS = {  # header: what is written of the result
    "detector": (DETECTOR, DETECTOR),
    "magnified": (DETECTOR | dict(EstimatedRadiographicMagnificationFactor=1.25), DETECTOR),
    "repeated": (REPEATED, DETECTOR),
    "calibrated": (DETECTOR | dict(PixelSpacing=[0.12, 0.12]), dict(PixelSpacing=[0.12, 0.12])),
    "calibrated to the same": (
        REPEATED | dict(PixelSpacingCalibrationType="FIDUCIAL"),
        dict(PixelSpacing=[0.15, 0.15]),
    ),
    "film": (dict(NominalScannedPixelSpacing=[0.1, 0.1]), dict(ImagerPixelSpacing=[0.1, 0.1])),
    "ratio": (dict(PixelAspectRatio=[2, 1]), dict(PixelAspectRatio=[2, 1])),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("name", SPACINGS)
def test_a_spacing_is_written_as_what_it_was_read_as(tmp_path, name):
    header, expected = SPACINGS[name]
    radiograph = check(write(tmp_path/"a.dcm", **header))
    assert ("detector" in radiograph.source) == radiograph.at_detector == ("ImagerPixelSpacing" in expected)
    ds = pydicom.dcmread(radiograph.write(tmp_path/"out.dcm", mark=False))
    sizes = "PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"
    found = {key: [float(v) for v in ds[key].value] for key in sizes if key in ds}
    assert found == expected


def test_a_ratio_that_contradicts_a_spacing_is_said(tmp_path):
    header = dict(PixelSpacing=[0.2, 0.2], PixelAspectRatio=[2, 1])
    assert check(write(tmp_path/"a.dcm", **header), words=1).pixel_aspect == 1


@pytest.fixture(scope="module")
def rotator():
    "The weights that come with the package"
    return RadRotator.from_pretrained("tiny", "cpu")


def blob():
    "A smooth picture with square pixels, 128×128: turned by bilinear interpolation it is itself again"
    y, x = np.mgrid[:128, :128]
    body = np.exp(-(((x - 64)/40)**2 + ((y - 64)/52)**2)**2)
    bone = sum(np.exp(-((x - a)**2 + (y - b)**2)/60) for a, b in ((44, 40), (84, 48), (64, 90)))
    return unit(0.5*body + 0.5*bone)


@pytest.mark.parametrize("facts", [dict(spacing=(4.0, 2.0)), dict(aspect=2.0)], ids=str)
@pytest.mark.parametrize("angles", [dict(y=12), dict(z=12), dict(x=8, y=5)], ids=str)
def test_pixels_that_are_not_square_are_turned_in_millimetres(rotator, facts, angles):
    square = Radiograph(blob(), (2.0, 2.0))
    flat = Radiograph(resize(square.pixels, (64, 128)), **facts)
    turned = rotator.rotate(flat, **angles)
    expected = resize(rotator.rotate(square, **angles).pixels, (64, 128))
    as_if_square = rotator.rotate(replace(flat, spacing=None, aspect=None), **angles).pixels
    def error(pixels): return np.abs(pixels - expected).mean()
    assert error(turned.pixels) < 0.25*error(as_if_square) and error(as_if_square) > 0.01
    assert (turned.shape, turned.spacing, turned.aspect) == (flat.shape, flat.spacing, flat.aspect)


def test_turned_by_nothing_a_flat_picture_is_itself(rotator):
    flat = Radiograph(resize(blob(), (64, 128)), (4.0, 2.0))
    assert np.array_equal(rotator.rotate(flat).pixels, flat.pixels)


@pytest.mark.parametrize("way", ["LF", "RF", "LH", "RH", "FL", "FR", "HL", "HR"])
def test_a_picture_is_brought_upright(tmp_path, way):
    "As it was stored, by the letters of PatientOrientation; pixels twice as high as wide lie down with it"
    stored = SCENE[:, ::-1] if "R" in way else SCENE
    stored = stored[::-1] if "H" in way else stored
    lies = way[0] in "FH"
    stored = np.ascontiguousarray(stored.T if lies else stored)
    header = dict(PatientOrientation=list(way), PixelSpacing=[0.1, 0.2] if lies else [0.2, 0.1])
    radiograph = check(write(tmp_path/"a.dcm", stored, **header), words=int(way != "LF"))
    assert radiograph.spacing == (0.2, 0.1)


# ---- files without a beginning, and frames ---------------------------------------------------------------------------

@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian,
                                    uid.DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("cut", ["preamble", "preamble and meta group"])
def test_a_file_without_its_preamble(tmp_path, syntax, cut):
    whole = write(tmp_path/"a.dcm", syntax=syntax).read_bytes()
    meta = 144 + struct.unpack("<L", whole[140:144])[0]
    if syntax == uid.DeflatedExplicitVRLittleEndian and cut != "preamble": return  # then nothing says what it is
    (tmp_path/"bare").write_bytes(whole[132 if cut == "preamble" else meta:])
    check(tmp_path/"bare")


def test_a_compressed_file_that_does_not_say_so_is_refused(tmp_path):
    encode, syntax = STREAMS["lossless"]
    whole = write(tmp_path/"a.dcm", stream=encode(), syntax=syntax).read_bytes()
    (tmp_path/"bare").write_bytes(whole[144 + struct.unpack("<L", whole[140:144])[0]:])
    check_refused(tmp_path/"bare", "TransferSyntaxUID")


def test_windows_of_single_frames(tmp_path):
    "What an enhanced file says of a frame counts for it, else what it says of all"
    def window(center, width):
        return make_sequence(FrameVOILUTSequence=make_sequence(WindowCenter=center, WindowWidth=width))
    run = np.stack([SCENE, SCENE])
    per_frame = pydicom.Sequence([window(1900, 1201)[0], make_item()])
    groups = dict(SharedFunctionalGroupsSequence=window(1000, 2001), PerFrameFunctionalGroupsSequence=per_frame)
    path = write(tmp_path/"a.dcm", run, NumberOfFrames=2, **groups)
    for frame, (center, width) in ((1, (1900, 1201)), (2, (1000, 2001))):
        shown = np.clip((SCENE - (center - 0.5))/(width - 1) + 0.5, 0, 1)
        assert np.allclose(read_radiograph(path, frame=frame).pixels, unit(shown), atol=1e-5)


# ---- pictures --------------------------------------------------------------------------------------------------------

def png_chunk(kind, data):
    "A chunk of a PNG: length, kind, data, checksum"
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png_bytes(samples, colour_type, extra=b""):
    "ISO 15948, by hand: samples of 16 bits, and chunks before them"
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">LLBBBBB", samples.shape[1], samples.shape[0], 16, colour_type, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + extra + pixels + png_chunk(b"IEND", b"")


HALF = np.where(COLUMN < 40, 65535, 0).astype(np.uint16)  # transparency
DEEP = {
    "grey": (SCENE, 0),
    "grey and alpha": (np.stack([SCENE, HALF], -1), 4),
    "colour": (np.stack([SCENE]*3, -1), 2),
    "colour and alpha": (np.stack([SCENE]*3 + [HALF], -1), 6),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("gamma", [None, 45455, 100000])
def test_png_of_sixteen_bits_keeps_its_levels(tmp_path, name, gamma):
    extra = png_chunk(b"gAMA", struct.pack(">L", gamma)) if gamma else b""
    samples, colour_type = DEEP[name]
    (tmp_path/"a.png").write_bytes(png_bytes(samples, colour_type, extra))
    read = check(tmp_path/"a.png")
    assert len(np.unique(read.pixels)) == len(np.unique(SCENE))
    (tmp_path/"a.png").write_bytes(png_bytes(samples, colour_type, extra)[:-20])
    with pytest.raises(RadRotatorError): read_radiograph(tmp_path/"a.png")


def test_luminance_of_deep_colours(tmp_path):
    colours = np.stack([SCENE, SCENE[::-1], SCENE[:, ::-1]], -1)
    (tmp_path/"a.png").write_bytes(png_bytes(colours, 2))
    tifffile.imwrite(tmp_path/"a.tif", colours, photometric="rgb")
    for name in ("a.png", "a.tif"): check(tmp_path/name, unit(colours @ [0.299, 0.587, 0.114]))


TIFFS = {  # how tifffile writes the scene
    "colour": dict(colours=3), "colour and alpha": dict(colours=4, extrasamples=["unassalpha"]),
    "planes": dict(colours=3, planarconfig="separate"), "tiled colour": dict(colours=3, tile=(32, 32)),
    "tiled planes": dict(colours=3, planarconfig="separate", tile=(32, 32), compression="deflate"),
    "JPEG 2000": dict(compression="jpeg2000"), "JPEG XL": dict(compression="jpegxl"),
    "JPEG XR": dict(compression="jpegxr"),
    "LERC": dict(compression="lerc"), "ZSTD": dict(compression="zstd"), "LZMA": dict(compression="lzma"),
    "tiled JPEG 2000": dict(compression="jpeg2000", tile=(32, 32)),
    "lossless WebP": dict(compression="webp", eight=True),
    "PackBits": dict(compression="packbits"), "predictor": dict(compression="zstd", predictor=True),
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_of_any_layout_and_codec(tmp_path, name):
    options = dict(TIFFS[name])
    colours = options.pop("colours", 1)
    stored = (SCENE >> 4).astype(np.uint8) if options.pop("eight", False) else SCENE
    if "WebP" in name:
        colours = 3
        options["compressionargs"] = dict(lossless=True)
    layers = np.stack([stored]*min(colours, 3) + [HALF]*(colours == 4), 0 if "planarconfig" in options else -1)
    options["photometric"] = "minisblack" if colours == 1 else "rgb"
    tifffile.imwrite(tmp_path/"a.tif", stored if colours == 1 else layers, **options)
    check(tmp_path/"a.tif", unit(stored), atol=2e-3 if "XR" in name else 1e-5)


def test_a_compression_that_nobody_knows_is_named(tmp_path):
    tifffile.imwrite(tmp_path/"a.tif", SCENE, photometric="minisblack", compression="zstd")
    data = (tmp_path/"a.tif").read_bytes()
    (tmp_path/"a.tif").write_bytes(data.replace(struct.pack("<H", 50000), struct.pack("<H", 34925 - 3), 1))
    check_refused(tmp_path/"a.tif", "compression")


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float16, np.uint32, np.float64])
def test_tiff_of_any_type(tmp_path, dtype):
    values = (SCENE.astype(float)/32 - 60).astype(dtype) if dtype != np.uint32 else SCENE.astype(dtype)*70000
    tifffile.imwrite(tmp_path/"a.tif", values, photometric="minisblack")
    check(tmp_path/"a.tif", unit(values))


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_deep_tiff_that_lies_on_its_side(tmp_path, orientation):
    colours = np.stack([SCENE]*3, -1)
    tifffile.imwrite(tmp_path/"a.tif", colours, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    check(tmp_path/"a.tif", unit(np.rot90(SCENE, 2 if orientation == 3 else -1)))


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_and_inks_of_tiff(tmp_path, bits):
    greys = np.repeat((np.arange(256)*257).astype(np.uint16)[None, ::-1], 3, 0)
    eight = (SCENE >> 4).astype(np.uint8)
    tifffile.imwrite(tmp_path/"a.tif", eight, photometric="palette", colormap=greys)
    check(tmp_path/"a.tif", 1 - unit(eight))
    full = 2**bits - 1
    ink = (full - (SCENE if bits == 16 else eight)).astype(f"u{bits//8}")
    inks = np.stack([np.zeros_like(ink)]*3 + [ink], -1)
    tifffile.imwrite(tmp_path/"a.tif", inks, photometric="separated")
    check(tmp_path/"a.tif", unit(full - ink.astype(float)), atol=0.01)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("dpi, aspect", [((200, 100), 2), ((72, 72), 1), ((100, 150), 2/3)])
def test_dots_that_are_not_square(tmp_path, suffix, dpi, aspect):
    Image.fromarray((SCENE >> 4).astype(np.uint8)).save(tmp_path/f"a.{suffix}", dpi=dpi)
    read = read_radiograph(tmp_path/f"a.{suffix}")
    assert abs(read.pixel_aspect/aspect - 1) < 0.02 and read.spacing is None
    back = read_radiograph(read.write(tmp_path/f"b.{suffix}", mark=False))
    assert abs(back.pixel_aspect/aspect - 1) < 0.02


# ---- others of their kind --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bits, high", [(13, 13), (10, 9), (10, 12)])
def test_samples_of_other_depths(tmp_path, codec, bits, high):
    "13 bits that end in bit 13, 10 bits that end in bit 12, and anything around them"
    samples = SCENE.astype(np.uint16) << 1 if bits == 13 else SCENE >> 2
    bottom = high + 1 - bits
    around = 0xFFFF & ~((1 << high + 1) - (1 << bottom))
    some = np.random.default_rng(0).random(SCENE.shape) < 0.1  # more would not be smaller by any codec
    cells = (samples << bottom | around*some).astype(np.uint16)
    check(write_cells(tmp_path/"a.dcm", codec, cells, bits=bits, high=high), unit(samples))


@pytest.mark.parametrize("limits", [(0, 100), (100, 0)])
def test_a_range_of_padding_in_any_order(tmp_path, limits):
    "PixelPaddingRangeLimit above PixelPaddingValue, or below it"
    stored, expected = padded(0)
    stored[:12] = np.linspace(0, 100, 12)[:, None]
    names = "PixelPaddingValue", "PixelPaddingRangeLimit"
    def change(ds):
        for name, value in zip(names, limits): ds.add_new(name, "US", value)
    check(write(tmp_path/"a.dcm", stored, change=change), expected)


@pytest.mark.parametrize("shape", [None, "INVERSE"])
def test_a_table_of_what_is_stored_inverted(tmp_path, shape):
    "MONOCHROME1 with a VOI LUT Sequence, and a window that does not count beside it; as DCMTK shows it"
    table = make_table([4096, 0, 16], CURVE.tolist())
    header = dict(PhotometricInterpretation="MONOCHROME1", PresentationLUTShape=shape, VOILUTSequence=table)
    check(write(tmp_path/"a.dcm", WindowCenter=2000, WindowWidth=100, **header), 1 - CURVED)


@pytest.mark.parametrize("text", [rb"r\f ", rb" R\F ", rb"R \F ", rb"RIGHT\FOOT", rb"ra\fl "])
def test_orientation_in_other_letters(tmp_path, text):
    "The sense of a turn depends on it: a mirrored picture is brought upright, however its letters are written"
    mirrored = np.ascontiguousarray(SCENE[:, ::-1])
    check(write(tmp_path/"a.dcm", mirrored, change=lambda ds: set_raw(ds, "PatientOrientation", text, "CS")), words=1)


@pytest.mark.parametrize("text", [b"", b"\\", b"L\\", b"R "])
def test_half_an_orientation_is_none(tmp_path, text):
    check(write(tmp_path/"a.dcm", change=lambda ds: set_raw(ds, "PatientOrientation", text, "CS")))


@pytest.mark.parametrize("codec", ["raw", "RLE", "JPEG lossless"])
def test_photometric_interpretation_in_small_letters(tmp_path, codec):
    path = write_cells(tmp_path/"a.dcm", codec, SCENE)
    ds = pydicom.dcmread(path)
    set_raw(ds, "PhotometricInterpretation", b"monochrome1", "CS")
    check(save_dicom(ds, path), 1 - unit(SCENE))


@pytest.mark.parametrize("codec", [name for name in CODECS if name not in ("raw", "implicit", "big endian")])
def test_a_file_that_ends_in_its_pixels_is_called_cut_short(tmp_path, codec):
    "And not by an attribute that was there"
    path = write_cells(tmp_path/"a.dcm", codec, SCENE)
    path.write_bytes(path.read_bytes()[:-500])
    check_refused(path, "cut short")


def test_bytes_behind_the_last_element(tmp_path):
    for behind in (b"garbage of an archive "*7, bytes(512)):
        path = write(tmp_path/"a.dcm")
        path.write_bytes(path.read_bytes() + behind)
        check(path)


def grouped(path, shared, own):
    "Two frames whose header gives a pixel spacing for all, and for each"
    ds = make_dicom(np.stack([SCENE, SCENE[::-1]]), **CASES)
    ds.NumberOfFrames = 2
    def measures(mm): return make_item(PixelMeasuresSequence=make_sequence(PixelSpacing=mm))
    ds.SharedFunctionalGroupsSequence = [measures(shared)]
    ds.PerFrameFunctionalGroupsSequence = [measures(mm) for mm in own]
    return save_dicom(ds, path)


@pytest.mark.parametrize("own, spacing, words", [
    ([[0.2, 0.2], [0.1, 0.1]], (0.1, 0.1), 1), ([[0.3, 0.3]]*2, (0.3, 0.3), 0), ([None, None], (0.3, 0.3), 0),
])
def test_a_spacing_for_all_frames_and_one_for_each(tmp_path, own, spacing, words):
    read, said = read_with_words(grouped(tmp_path/"a.dcm", [0.3, 0.3], own), frame=2)
    assert read.spacing == spacing and len(said) == words and np.allclose(read.pixels, unit(SCENE[::-1]), atol=1e-5)


def test_detector_pixels_that_are_not_square(tmp_path):
    header = dict(ImagerPixelSpacing=[0.3, 0.15], EstimatedRadiographicMagnificationFactor=1.25)
    read = check(write(tmp_path/"a.dcm", **header))
    assert read.spacing == (0.3, 0.15) and read.at_detector and read.pixel_aspect == 2 and "1.25" in read.source


def test_the_index_of_a_disc(tmp_path):
    index = pydicom.fileset.FileSet()
    facts = dict(StudyID="1", SeriesNumber=1, StudyTime="1200", InstanceNumber=1)
    index.add(write(tmp_path/"a.dcm", **facts))
    index.write(tmp_path/"disc")
    check_refused(tmp_path/"disc"/"DICOMDIR", "DICOMDIR")


def zip_bytes(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive: archive.writestr("a.dcm", data)
    return file.getvalue()


def picture_bytes(kind):
    file = io.BytesIO()
    Image.fromarray((SCENE >> 4).astype(np.uint8)).save(file, kind)
    return file.getvalue()


FOREIGN = {
    "ZIP": (lambda: zip_bytes(b"DICOM"), "Unpack"), "gzip": (lambda: gzip.compress(b"DICOM"), "Unpack"),
    "BMP": (lambda: picture_bytes("BMP"), "PNG"), "GIF": (lambda: picture_bytes("GIF"), "PNG"),
    "WebP": (lambda: picture_bytes("WEBP"), "PNG"), "PGM": (lambda: picture_bytes("PPM"), "PNG"),
    "JP2": (lambda: imagecodecs.jpeg2k_encode(SCENE), "JPEG 2000"), "PDF": (lambda: b"%PDF-1.7", "PDF"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_else_a_file_may_be_is_named(tmp_path, name):
    make, word = FOREIGN[name]
    (tmp_path/"a.dcm").write_bytes(make())
    check_refused(tmp_path/"a.dcm", word)


SMALL = (SCENE[::4, ::4] >> 4).astype(np.uint8)


@pytest.mark.parametrize("eight", [True, False])  # Pillow reads the one, tifffile the other
@pytest.mark.parametrize("beside", [dict(subfiletype=1), dict(subfiletype=4), None], ids=["smaller", "mask", "another"])
def test_pages_that_are_no_pictures_of_their_own(tmp_path, eight, beside):
    "A smaller copy, or a mask, is passed over; another picture must be chosen"
    stored = (SCENE >> 4).astype(np.uint8) if eight else SCENE
    with tifffile.TiffWriter(tmp_path/"a.tif") as file:
        file.write(SMALL, photometric="minisblack", subfiletype=1)
        file.write(stored, photometric="minisblack")
        if beside: file.write(SMALL > 90 if beside["subfiletype"] == 4 else SMALL, photometric="minisblack", **beside)
        else: file.write(stored[::-1], photometric="minisblack")
    if beside: check(tmp_path/"a.tif", unit(stored))
    else:
        with pytest.raises(RadRotatorError) as caught: read_radiograph(tmp_path/"a.tif")
        assert caught.value.code == "WHICH_FRAME"
        assert np.allclose(read_radiograph(tmp_path/"a.tif", frame=2).pixels, unit(stored[::-1]), atol=1e-5)


def test_white_is_zero_beside_transparency(tmp_path):
    options = dict(photometric="miniswhite", extrasamples=["unassalpha"], planarconfig="contig")
    tifffile.imwrite(tmp_path/"a.tif", np.stack([SCENE, HALF], -1), **options)
    check(tmp_path/"a.tif", 1 - unit(SCENE))


@pytest.mark.parametrize("bits", [4, 10, 12, 14])
@pytest.mark.parametrize("white", [False, True])
def test_samples_packed_closely(tmp_path, bits, white):
    "TIFF by hand: samples of any depth without a gap between them"
    samples = SCENE >> (12 - bits) if bits < 12 else SCENE << (bits - 12)
    ones = np.unpackbits(samples.astype(">u2").view(np.uint8).reshape(HEIGHT, WIDTH, 2), axis=-1)[..., 16 - bits:]
    data = np.packbits(ones.reshape(HEIGHT, -1), axis=1).tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: int(not white), 273: 8, 277: 1, 278: HEIGHT, 279: len(data)}
    entries = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<L", 8 + len(data))
    (tmp_path/"a.tif").write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    check(tmp_path/"a.tif", 1 - unit(samples) if white else unit(samples))
