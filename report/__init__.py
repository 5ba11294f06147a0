"""Pages to look at: what an evaluation found, image by image, and what a data set holds.

A page is a folder that needs no network: index.html and, beside it, pictures/.
"""

from report.pages import PICTURES, check_folder, write_evaluation, write_inspection

__all__ = ["PICTURES", "check_folder", "write_evaluation", "write_inspection"]
