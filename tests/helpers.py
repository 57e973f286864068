"""What several tests and notebooks make: a body that has a left and a right, DICOM files with a patient, CT series."""
import gzip, io, warnings

import nibabel as nib
import numpy as np
import pydicom
from pydicom import uid

from radrotator.ct.volume import CT

PATIENT = dict(
    PatientName="Secret^Name",
    PatientID="ID4711",
    PatientBirthDate="19440506",
    StudyDate="20050317",
    AcquisitionDate="20050317",
    AccessionNumber="ACC99",
    InstitutionName="Hidden Hospital",
    ReferringPhysicianName="Doctor^Who",
)  # in the header of every DICOM file made here, and nowhere else

LITTLE_ENDIAN = uid.ExplicitVRLittleEndian
CLASSES = dict(
    CT=uid.CTImageStorage,
    CR=uid.ComputedRadiographyImageStorage,
    RF=uid.XRayRadiofluoroscopicImageStorage,
)


# ---- DICOM -----------------------------------------------------------------------------------------------------------

def make_dicom(stored, modality="DX", bits=None, stream=None, syntax=LITTLE_ENDIAN, compress=None, **header):
    "A DICOM dataset of stored values (H, W) or (frames, H, W), or of a stream that another encoder made"
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = LITTLE_ENDIAN if compress else syntax
    ds.SOPClassUID = CLASSES.get(modality, uid.DigitalXRayImageStorageForPresentation)
    ds.SOPInstanceUID = uid.generate_uid()
    ds.StudyInstanceUID = uid.generate_uid()
    ds.SeriesInstanceUID = uid.generate_uid()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.Modality = modality
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelRepresentation = 0
    ds.BitsAllocated = 8*stored.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    if stream is None:
        order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
        ds.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    else:
        ds.PixelData = pydicom.encaps.encapsulate([stream])
        ds["PixelData"].VR = "OB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of values that are wrong on purpose
        for name, value in (PATIENT | header).items(): setattr(ds, name, value)
    if compress: ds.compress(compress[0], **compress[1])
    return ds


def save_dicom(ds, file):
    "Write a dataset into a file, or a path, in its transfer syntax; the file"
    syntax = ds.file_meta.TransferSyntaxUID
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        form = dict(implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
        ds.save_as(file, **form, enforce_file_format=True)
    return file


def dicom_bytes(*stored, **options):
    "A DICOM file, as bytes: see `make_dicom`"
    return save_dicom(make_dicom(*stored, **options), io.BytesIO()).getvalue()


# ---- CT --------------------------------------------------------------------------------------------------------------

def body(shape=(30, 24, 40), spacing=(1.5, 1.5, 1.0)):
    "A body that has a left and a right: bone on the right, a ball on the left, in front and above"
    hu = np.full(shape, -1000.0, np.float32)
    hu[4:-4, 3:-3] = 40
    hu[-10:-6, 6:12, 4:-4] = 900
    hu[6:10, 15:19, -10:-6] = 300
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -60, 20, -700
    return CT(hu, affine)


def ct_slice(ct, k, feet=False, shear=0.0, **header):
    "Slice k of a CT as a scanner writes it, head first or feet first, with a slope and an intercept of its own"
    slope, intercept = 1 + k % 2, -1024 - k
    picture = ct.hu[::1 if feet else -1, ::-1, k].T  # the first row lies in front, the first column right or left
    stored = np.rint((picture - intercept)/slope).astype("<u2")
    low = ct.affine[:3, 3]
    high = low + ct.affine[:3, :3] @ (np.array(ct.shape) - 1)
    thickness = ct.spacing[2]
    where = [-low[0] if feet else -high[0], -high[1] + shear*k*thickness, low[2] + k*thickness]  # LPS
    facts = dict(
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        InstanceNumber=(7*k) % ct.shape[2],
        ImagePositionPatient=where,
        ImageOrientationPatient=[-1.0 if feet else 1.0, 0, 0, 0, 1, 0],
        PixelSpacing=[*ct.spacing[[1, 0]]],
        SliceThickness=5,  # never true
        RescaleSlope=slope,
        RescaleIntercept=intercept,
    )
    return make_dicom(stored, "CT", **facts | header)


def write_series(folder, ct, series=None, drop=(), repeat=(), spoil=lambda k, ds: None, **options):
    "A CT as an axial series; `spoil` changes slices, header fields are given by name; the folder"
    folder.mkdir(parents=True, exist_ok=True)
    options["SeriesInstanceUID"] = series or uid.generate_uid()
    for k in (k for k in range(ct.shape[2]) if k not in drop for _ in range(1 + (k in repeat))):
        ds = ct_slice(ct, k, **options)
        spoil(k, ds)
        save_dicom(ds, folder/f"IM{len(list(folder.iterdir())):04d}")
    return folder


def make_item(**fields):
    "A DICOM dataset of these fields"
    ds = pydicom.Dataset()
    for name, value in fields.items(): setattr(ds, name, value)
    return ds


def make_sequence(**fields):
    "A DICOM sequence of one item"
    return pydicom.Sequence([make_item(**fields)])


def frame_place(ds):
    "What an enhanced CT says of the frame that would be this slice"
    return dict(
        PlanePositionSequence=make_sequence(ImagePositionPatient=ds.ImagePositionPatient),
        PlaneOrientationSequence=make_sequence(ImageOrientationPatient=ds.ImageOrientationPatient),
        PixelValueTransformationSequence=make_sequence(
            RescaleSlope=ds.RescaleSlope,
            RescaleIntercept=ds.RescaleIntercept,
        ),
    )


def write_enhanced(path, ct, order=None, **macros):
    "A CT as one enhanced file, its frames in disorder; a macro of None is missing in every frame; the path"
    slices = [ct_slice(ct, k) for k in range(ct.shape[2])]
    order = np.random.default_rng(0).permutation(len(slices)) if order is None else order
    slices = [slices[k] for k in order]
    ds = slices[0].copy()
    frames = [make_item(**{k: v for k, v in (frame_place(s) | macros).items() if v is not None}) for s in slices]
    ds.PerFrameFunctionalGroupsSequence = pydicom.Sequence(frames)
    measures = make_sequence(PixelSpacing=ds.PixelSpacing, SliceThickness=1)
    ds.SharedFunctionalGroupsSequence = make_sequence(PixelMeasuresSequence=measures)
    for name in "ImagePositionPatient ImageOrientationPatient PixelSpacing RescaleSlope RescaleIntercept".split():
        delattr(ds, name)
    ds.NumberOfFrames = len(slices)
    ds.PixelData = b"".join(s.PixelData for s in slices)
    return save_dicom(ds, path)


# ---- NIfTI -----------------------------------------------------------------------------------------------------------

def nifti_bytes(stored, affine, kind=nib.Nifti1Image, sform=1, qform=1, **fields):
    "A NIfTI file by nibabel, as bytes, with some header fields overwritten, whatever nibabel thinks of them"
    image = kind(stored.astype(np.int16), affine)
    image.set_sform(affine if sform else None, sform)
    image.set_qform(affine if qform else None, qform)
    data = bytearray(image.to_bytes())
    form = nib.Nifti1Header if kind is nib.Nifti1Image else nib.Nifti2Header
    header = form(bytes(data[:form.template_dtype.itemsize]), check=False)
    for name, value in fields.items(): header[name] = value
    data[:len(header.binaryblock)] = header.binaryblock
    return bytes(data)


def write_nifti_file(path, ct, hu=None, **options):
    "A CT as NIfTI, or its place with other values; the path"
    data = nifti_bytes(ct.hu if hu is None else hu, ct.affine, **options)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
