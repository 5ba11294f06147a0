"""The readers are in annotations.py; this is for programs that import them from here."""

from annotations import LabelmeDataset as LabelmeDataset
from annotations import ViaDataset as ViaDataset
