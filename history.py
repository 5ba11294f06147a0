"""Stands in for the lead's module of this name until the merge: take theirs."""

from training import Record as Record
from training import read_history as read_history
