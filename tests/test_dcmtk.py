"""Some hundreds of made-up headers, each attribute absent, empty, odd or as it should be, read by DCMTK and by us: the same
grey values, or a refusal that names the attribute."""
import shutil, subprocess, warnings
from dataclasses import dataclass, field

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataelem import RawDataElement

from helpers import make_item
from radrotator.core import RadRotatorError
from radrotator.radiograph.read import read_radiograph

HEIGHT, WIDTH = 40, 32
ROW, COLUMN = np.mgrid[:HEIGHT, :WIDTH]
SCENE = 2000 + 1200*np.sin(ROW/7)*np.cos(COLUMN/5) + 15*COLUMN  # 12 bits, without a symmetry
PADDED = slice(0, 5)  # rows
SEED = 20
FILES = 400

# What an attribute may say: text and numbers as a file holds them; None: it is absent; "": it is there and empty.
LAYOUTS = [(16, 12, 11), (16, 12, 15), (16, 16, 15), (16, 14, 13), (16, 10, 9), (8, 8, 7), (32, 12, 11), (16, 13, 14)]
SYNTAXES = [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless]
CHOICES = dict(
    PhotometricInterpretation=["MONOCHROME1", "MONOCHROME1 ", None, "", "HSV", "MONOCHROME3"],
    PresentationLUTShape=["IDENTITY", "INVERSE", "", "SHAPE", "LIN OD"],
    RescaleSlope=["1", "2", "0.5", "-1", "-0.5", "", "0", "abc", "1e-3"],
    RescaleIntercept=["0", "-1024", "-2048.5", "100", "", "abc"],
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
KINDS = dict(
    PhotometricInterpretation="CS", PresentationLUTShape="CS", VOILUTFunction="CS", RescaleType="LO",
    PixelAspectRatio="IS", NumberOfFrames="IS", PixelPaddingValue="US", PixelRepresentation="US", BitsStored="US",
    HighBit="US", SamplesPerPixel="US",
)  # all others are DS
CURVE = np.rint(250*np.sqrt(np.arange(4096))).astype("<u2")
