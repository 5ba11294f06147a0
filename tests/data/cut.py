"""Cuts out of the reference's files in ../shared/golden what every clone of the repository tests.

    python tests/data/cut.py

Left out: photographs, the large images' feature maps, statistics, and what follows from the rest.
"""

import re
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parents[2] / "shared" / "golden"
KEPT = {
    "inference_small.npz": r"synth/(?!.*\.stats|image_|sha256_image|source|scale|padding)"
    r"|photo1/(rpn_rois|edge_zeroed_rois|sha256_resized)$",
    "inference_coco.npz": r"\w+/(rpn_rois|edge_zeroed_rois|sha256_resized)$",
    "detectron2/detectron2_ops.npz": r"(apply_deltas|levels)/|anchors/(?!\w+/p[23]$)"
    r"|paste/(masks|boxes|image_shape|\w+_packed)$",
    "training_side.npz": r"(?!.*/boxes_(px|norm)$|.*/in_shape|.*/grad_sample|roi_align/out14)"
    r"|anchors/256_stride2/|roi_align/boxes_norm$",
    "training_step_small.npz": r"(stop/)?grad/|stop/|gt_|target_|rpn_(match|rois)|rois$"
    r"|\w+_loss$|weight_names$",
}


def main() -> None:
    for name, kept in KEPT.items():
        with np.load(GOLDEN / name) as file:
            arrays = {key: file[key] for key in file.files if re.match(kept, key)}
        part = HERE / Path(name).name
        np.savez_compressed(part, **arrays)
        print(f"{name}: {len(arrays)} arrays, {part.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
