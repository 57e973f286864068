"""Bad files by the hundred: each is refused in one sentence, without a traceback or a word of what its header says."""
import gzip, io, logging, os, struct, warnings, zlib

import imagecodecs
import nibabel as nib
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom import uid

from helpers import PATIENT, dicom_bytes, nifti_bytes, write_series
from radrotator.core import RadRotatorError
from radrotator.ct.nifti import write_ct
from radrotator.ct.read import read_ct
from radrotator.ct.volume import CT
from radrotator.radiograph.image import Radiograph
from radrotator.radiograph.read import read_radiograph

FRACTIONS = [i/40 for i in range(40)]
NOISE = np.random.default_rng(0).integers(0, 4096, (64, 48)).astype(np.uint16)


def picture(format, **options):
    "A picture file with structure everywhere, so that no end of it can be missed"
    noise = np.random.default_rng(0).integers(0, 60000, (64, 48)).astype(np.uint16)
    image = Image.fromarray(noise) if format != "JPEG" else Image.fromarray((noise >> 8).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def tiled(**options):
    "A TIFF of tiles, by another library"
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 60000, (64, 48)).astype(np.uint16)
    tifffile.imwrite(file, noise, tile=(16, 16), photometric="minisblack", **options)
    return file.getvalue()


def lossless(bits=16):
    "A lossless JPEG stream"
    return imagecodecs.jpeg8_encode(NOISE << (bits - 12), lossless=True, bitspersample=bits)


def dicom(modality="DX", stored=NOISE, **options):
    "A DICOM file, as bytes, with a patient in it who must not come out"
    return dicom_bytes(stored, modality, **options)


def nifti(shape=(24, 20, 16), kind=nib.Nifti1Image, **header):
    "A NIfTI file, as bytes"
    return nifti_bytes(np.random.default_rng(0).integers(-1000, 1500, shape), np.diag([1.0, 1, 2, 1]), kind, **header)


def refused(reader, path, *also_hidden):
    "The code of the error with which `reader` refuses `path`, in one sentence that gives nothing away"
    with pytest.raises(RadRotatorError) as caught: reader(path)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message.replace(str(path), "")) < 300, message
    for hidden in (*PATIENT.values(), "Secret", "4711", "Traceback", "Error", "0x", *also_hidden):
        assert hidden not in message, message
    assert caught.value.code != "ERROR", message
    return caught.value.code


def cuts(data, fractions=FRACTIONS, last=(1, 2, 13, 100)):
    "A file cut short in many places"
    lengths = {int(f * len(data)) for f in fractions} | {len(data) - n for n in last}
    return [data[:n] for n in sorted(lengths)]


BIG_ENDIAN = tiled(byteorder=">")
MIN_IS_BLACK = b"\x01\x06\0\x03\0\0\0\x01\0\x01"  # the tag PhotometricInterpretation
PICTURES = {
    "png": picture("PNG"),
    "tif": picture("TIFF"),
    "lzw.tif": picture("TIFF", compression="tiff_lzw"),
    "jpg": picture("JPEG"),
    "progressive.jpg": picture("JPEG", progressive=True),
    "lossless.jpg": lossless(),
    "tiled.tif": tiled(compression="deflate"),
    "white is zero.tif": BIG_ENDIAN.replace(MIN_IS_BLACK, MIN_IS_BLACK[:-1] + b"\0"),
}
EIGHT = np.zeros((64, 48), np.uint8)
DICOMS = {
    "raw": dicom(),
    "j2k": dicom(compress=(uid.JPEG2000Lossless, {})),
    "jls": dicom(compress=(uid.JPEGLSLossless, {})),
    "rle": dicom(compress=(uid.RLELossless, {})),
    "deflated": dicom(syntax=uid.DeflatedExplicitVRLittleEndian),
    "jpeg": dicom(stored=EIGHT, stream=PICTURES["jpg"], syntax=uid.JPEGBaseline8Bit),
    "lossless": dicom(bits=12, stream=lossless(12), syntax=uid.JPEGLosslessSV1),
}
NIFTIS = {"nii": nifti(), "nii.gz": gzip.compress(nifti(), mtime=0), "2.nii": nifti(kind=nib.Nifti2Image)}


@pytest.mark.parametrize("name", PICTURES)
def test_whole_pictures_are_read_and_cut_ones_refused(tmp_path, name):
    path = tmp_path/f"a.{name}"
    path.write_bytes(PICTURES[name])
    assert read_radiograph(path).shape == (64, 48)
    for data in cuts(PICTURES[name], last=(13, 100)):
        path.write_bytes(data)
        assert refused(read_radiograph, path) == "UNREADABLE"


@pytest.mark.parametrize("name", DICOMS)
def test_whole_dicom_is_read_and_cut_refused(tmp_path, name):
    path = tmp_path/"a.dcm"
    path.write_bytes(DICOMS[name])
    whole = read_radiograph(path)
    assert whole.shape == (64, 48)
    for data in cuts(DICOMS[name], last=(13, 100)):
        path.write_bytes(data)
        assert refused(read_radiograph, path) == "UNREADABLE"


@pytest.mark.parametrize("name", NIFTIS)
def test_whole_nifti_is_read_and_cut_refused(tmp_path, name):
    path = tmp_path/f"a.{name}"
    path.write_bytes(NIFTIS[name])
    assert read_ct(path).shape == (24, 20, 16)
    for data in cuts(NIFTIS[name]):
        path.write_bytes(data)
        assert refused(read_ct, path) == "UNREADABLE"


@pytest.mark.parametrize("name", NIFTIS)
def test_damage_is_found_or_harmless(tmp_path, name):
    "Bytes changed at random: a CT or a refusal, never another exception"
    generator, path = np.random.default_rng(1), tmp_path/f"a.{name}"
    path.write_bytes(NIFTIS[name])
    whole = read_ct(path).hu
    for _ in range(100):
        data = bytearray(NIFTIS[name])
        end = 560 if generator.random() < 0.7 else len(data)
        for place in generator.integers(0, end, 3): data[place] = generator.integers(256)
        path.write_bytes(data)
        try: hu = read_ct(path).hu
        except RadRotatorError as error: assert "\n" not in str(error)
        else: assert np.array_equal(hu, whole) if name == "nii.gz" else np.isfinite(hu).all()  # a .gz has a checksum


@pytest.mark.parametrize("name", [*PICTURES, *DICOMS])
def test_damaged_radiographs_are_read_or_refused(tmp_path, name):
    data = PICTURES.get(name) or DICOMS[name]
    path = tmp_path/"a"
    generator = np.random.default_rng(2)
    for _ in range(60):
        spoilt = bytearray(data)
        end = 1000 if generator.random() < 0.7 else len(data)
        for place in generator.integers(0, end, 3): spoilt[place % len(data)] = generator.integers(256)
        path.write_bytes(spoilt)
        try:
            pixels = read_radiograph(path).pixels
            assert 0 <= pixels.min() < pixels.max() <= 1
        except RadRotatorError as error: assert "\n" not in str(error) and "Secret" not in str(error)


HEADERS = {  # what a header says, and the code that it gets
    "no rows": (dict(Rows=0), "UNREADABLE"),
    "huge": (dict(Rows=65535, Columns=65535), "TOO_LARGE"),
    "wide": (dict(Columns=20000), "UNREADABLE"),
    "frames": (dict(NumberOfFrames=1000), "WHICH_FRAME"),
    "bits": (dict(BitsAllocated=64), "UNREADABLE"),
    "no bits": (dict(BitsAllocated=0), "UNREADABLE"),
    "samples": (dict(SamplesPerPixel=200), "UNREADABLE"),
    "colour": (dict(PhotometricInterpretation="SECRET"), "UNREADABLE"),
    "MR": (dict(modality="MR"), "NOT_A_RADIOGRAPH"),
    "CT": (dict(modality="CT"), "NOT_A_RADIOGRAPH"),
    "report": (dict(modality="SR"), "NOT_A_RADIOGRAPH"),
    "long": (dict(modality="SECRET NAME", Rows=0), "UNREADABLE"),
    "slope": (dict(RescaleSlope=float("nan"), RescaleIntercept=0), "UNREADABLE"),
    "even": (dict(stored=np.full((64, 48), 7, np.uint16)), "BLANK"),
    "narrow": (dict(stored=np.zeros((64, 2), np.uint16)), "TOO_SMALL"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(tmp_path, name):
    header, code = HEADERS[name]
    (tmp_path/"a.dcm").write_bytes(dicom(**header))
    assert refused(read_radiograph, tmp_path/"a.dcm", "SECRET") == code


def test_no_pixels(tmp_path):
    ds = pydicom.dcmread(io.BytesIO(dicom()))
    del ds.PixelData
    ds.save_as(tmp_path/"a.dcm")
    assert refused(read_radiograph, tmp_path/"a.dcm") == "UNREADABLE"


def test_deflated_bomb(tmp_path, monkeypatch):
    "A deflated DICOM file of some KB that unpacks to more than the limit"
    monkeypatch.setattr("radrotator.dicom.MAX_BYTES", 2**22)
    whole = DICOMS["deflated"]
    meta = whole[:144 + struct.unpack("<L", whole[140:144])[0]]
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    (tmp_path/"a.dcm").write_bytes(meta + squeeze.compress(bytes(2**22 + 1)) + squeeze.flush())
    assert refused(read_radiograph, tmp_path/"a.dcm") == "TOO_LARGE"
    (tmp_path/"series").mkdir()
    (tmp_path/"a.dcm").rename(tmp_path/"series"/"a.dcm")
    assert refused(read_ct, tmp_path/"series") == "TOO_LARGE"


def test_stream_larger_than_its_header(tmp_path):
    "A JPEG 2000 stream that claims 4 billion columns behind a small header"
    data = bytearray(DICOMS["j2k"])
    start = data.index(b"\xff\x4f\xff\x51")
    data[start + 8:start + 12] = b"\xff\xff\xff\xf0"
    (tmp_path/"a.dcm").write_bytes(data)
    assert refused(read_radiograph, tmp_path/"a.dcm") == "UNREADABLE"


@pytest.mark.parametrize("side", [9000, 15000, 30000, 2**31 - 1])
def test_picture_bombs(tmp_path, side):
    "A PNG of a hundred bytes that claims to be enormous"
    def chunk(kind, data):
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", side, side, 16, 0, 0, 0, 0))
    rest = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    (tmp_path/"a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + rest)
    assert refused(read_radiograph, tmp_path/"a.png") == "TOO_LARGE"


SPOILT = {  # what a header says, and the reason that it gets
    "4-D": (nifti((8, 8, 8, 3)), "NOT_A_VOLUME"),
    "5-D": (nifti((8, 8, 8, 1, 3)), "NOT_A_VOLUME"),
    "picture": (nifti((24, 20, 1)), "NOT_A_VOLUME"),
    "huge": (nifti(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "TOO_LARGE"),
    "negative": (nifti(dim=[3, -5, 20, 16, 1, 1, 1, 1]), "NOT_A_VOLUME"),
    "no dimensions": (nifti(dim=[0, 24, 20, 16, 1, 1, 1, 1]), "NOT_A_VOLUME"),
    "many": (nifti(dim=[99, 24, 20, 16, 1, 1, 1, 1]), "UNREADABLE"),
    "no place": (nifti(sform_code=0, qform_code=0), "NO_ORIENTATION"),
    "far": (nifti(qoffset_x=500), "NO_ORIENTATION"),
    "nan": (nifti(srow_x=[np.nan]*4, qform_code=0), "BAD_GEOMETRY"),
    "flat": (nifti(srow_z=[0]*4, qform_code=0), "BAD_GEOMETRY"),
    "km": (nifti(srow_x=[1e6, 0, 0, 0], qform_code=0), "BAD_GEOMETRY"),
    "sheared": (nifti(srow_x=[1, 0, 0.5, 0], qform_code=0), "GANTRY_TILT"),
    "type": (nifti(datatype=12345), "UNREADABLE"),
    "rgb": (nifti(datatype=128, bitpix=24), "NOT_HU"),
    "offset": (nifti(vox_offset=1e9), "UNREADABLE"),
    "no offset": (nifti(vox_offset=0), "UNREADABLE"),
    "offset nan": (nifti(vox_offset=np.nan), "UNREADABLE"),
    "intercept": (nifti(scl_slope=1, scl_inter=np.nan), "NOT_HU"),
    "pair": (nifti(magic=b"ni1"), "UNREADABLE"),
    "not HU": (nifti(scl_slope=1, scl_inter=5000), "NOT_HU"),
    "all padding": (nifti(scl_slope=1, scl_inter=-9000), "NOT_HU"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_nifti_headers_that_lie(tmp_path, name):
    data, code = SPOILT[name]
    (tmp_path/"a.nii").write_bytes(data)
    assert refused(read_ct, tmp_path/"a.nii") == code


def test_labels_that_do_not_fit(tmp_path):
    (tmp_path/"a.nii").write_bytes(nifti())
    (tmp_path/"a_labels.nii.gz").write_bytes(gzip.compress(nifti((5, 5, 5))))
    assert refused(read_ct, tmp_path/"a.nii") == "BAD_LABELS"


TEXT = b"Dear colleague, Secret^Name came to see us.\n"*40
NOT_THAT = {
    "empty": b"",
    "zero": b"\0",
    "zeros": b"\0"*1000,
    "text": TEXT,
    "gzip": gzip.compress(TEXT, mtime=0),
    "noise": np.random.default_rng(3).bytes(3000),
    "mark": b"\0"*128 + b"DICM",
    "mark and text": b"\0"*128 + b"DICM" + TEXT,
}


@pytest.mark.parametrize("reader", [read_ct, read_radiograph])
@pytest.mark.parametrize("name", ["a.dcm", "a.png", "a.tif", "a.jpg", "a.nii", "a.nii.gz", "a", "a.docx"])
@pytest.mark.parametrize("data", NOT_THAT)
def test_not_what_the_name_says(tmp_path, reader, name, data):
    (tmp_path/name).write_bytes(NOT_THAT[data])
    refused(reader, tmp_path/name)


def test_wrong_kind(tmp_path):
    radiographs = {f"p.{k}": data for k, data in PICTURES.items()} | {f"{k}.dcm": data for k, data in DICOMS.items()}
    for name, data in radiographs.items():
        (tmp_path/name).write_bytes(data)
        assert refused(read_ct, tmp_path/name) == "NOT_CT"
    for name, data in ({f"a.{k}": data for k, data in NIFTIS.items()} | {"slice.dcm": dicom("CT")}).items():
        (tmp_path/name).write_bytes(data)
        assert refused(read_radiograph, tmp_path/name) == "NOT_A_RADIOGRAPH"


@pytest.mark.parametrize("reader", [read_ct, read_radiograph])
def test_no_file_at_all(tmp_path, reader):
    refused(reader, tmp_path/"missing.dcm")
    refused(reader, tmp_path/"missing"/"a.nii")
    refused(reader, tmp_path)
    os.mkfifo(tmp_path/"pipe.dcm")
    refused(reader, tmp_path/"pipe.dcm")
    (tmp_path/"loop.nii").symlink_to(tmp_path/"loop.nii")
    refused(reader, tmp_path/"loop.nii")
    (tmp_path/"folder.nii").mkdir()
    refused(reader, tmp_path/"folder.nii")
    refused(reader, str(tmp_path/("a" * 300)))


NOISY = CT(np.random.default_rng(0).integers(-1024, 1976, (24, 20, 6)).astype(np.float32), np.diag([1.0, 1, 2, 1]))


def series(folder, **spoilt):
    "Six CT slices, the third with some header fields spoilt"
    def spoil(k, ds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of values that are wrong on purpose
            for name, value in spoilt.items():
                if k == 2: setattr(ds, name, value)
    return write_series(folder, NOISY, spoil=spoil)


SLICES = {  # what the header of one slice says, and the code that the series gets
    "moved": (dict(ImagePositionPatient=[0, 0, 4.7]), "UNEVEN_SLICES"),
    "twice": (dict(ImagePositionPatient=[0, 0, 2]), "DUPLICATE_SLICES"),
    "nan": (dict(ImagePositionPatient=[0, 0, float("nan")]), "BAD_GEOMETRY"),
    "two numbers": (dict(ImagePositionPatient=[0, 4]), "BAD_GEOMETRY"),
    "localizer": (dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "MISSING_SLICES"),
    "no place": (dict(ImagePositionPatient=None), "MISSING_SLICES"),
    "series": (dict(SeriesInstanceUID="1.2.4"), "MIXED_SERIES"),
    "slope": (dict(RescaleSlope=0), "NOT_HU"),
    "frames": (dict(NumberOfFrames=5), "MULTI_FRAME"),
    "bits": (dict(BitsAllocated=7), "UNREADABLE"),
    "huge": (dict(Rows=60000, Columns=60000), "MIXED_SERIES"),
}


@pytest.mark.parametrize("name", SLICES)
def test_one_bad_slice(tmp_path, name):
    spoilt, code = SLICES[name]
    assert read_ct(series(tmp_path/"good")).shape == (24, 20, 6)
    assert refused(read_ct, series(tmp_path/"bad", **spoilt)) == code


def test_cut_slices(tmp_path):
    whole = (series(tmp_path/"a")/"IM0002").read_bytes()
    for data in cuts(whole, last=(13, 100)):
        (tmp_path/"a"/"IM0002").write_bytes(data)
        assert refused(read_ct, tmp_path/"a") in ("UNREADABLE", "MISSING_SLICES")


def test_what_is_beside_a_series_does_no_harm(tmp_path):
    folder = series(tmp_path/"a")
    (folder/"README.txt").write_text("notes")
    (folder/".DS_Store").write_bytes(b"\0")
    (folder/"more").mkdir()
    (folder/"report").write_bytes(dicom("SR"))
    assert read_ct(folder).shape == (24, 20, 6)


def test_nothing_half_written(tmp_path):
    radiograph = Radiograph(np.random.default_rng(0).random((64, 48)))
    for name in ("a.bmp", "a"): assert refused(radiograph.write, tmp_path/name) == "BAD_SUFFIX"
    for name in ("no/a.png", "no/a.dcm"): assert refused(radiograph.write, tmp_path/name) == "NO_FOLDER"
    (tmp_path/"a.nii").write_bytes(nifti())
    ct = read_ct(tmp_path/"a.nii")
    for name, code in {"b.mha": "BAD_SUFFIX", "no/b.nii.gz": "NO_FOLDER"}.items():
        assert refused(lambda path: write_ct(ct, path), tmp_path/name) == code
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii"]


def test_pydicom_is_left_as_it_was(tmp_path):
    before = pydicom.config.settings.reading_validation_mode, logging.getLogger("pydicom").level
    (tmp_path/"a.dcm").write_bytes(DICOMS["raw"][:900])
    refused(read_radiograph, tmp_path/"a.dcm")
    assert before == (pydicom.config.settings.reading_validation_mode, logging.getLogger("pydicom").level)
