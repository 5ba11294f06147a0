"""Draws the pictures of the README with the weights that ship: python assets/make_pictures.py"""

import sys
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import demo  # noqa: E402
import visualize  # noqa: E402
from model import MaskRCNN  # noqa: E402

if __name__ == "__main__":
    model = MaskRCNN.from_weights("shapes")
    names = demo.class_names(model.config)
    for name, image in demo.sample_images("shapes").items():
        result, stages = demo.draw_stages(model, image, names)
        arguments = (result["rois"], result["masks"], result["class_ids"], names, result["scores"])
        pictures = {name: visualize.draw_instances(image, *arguments)}
        if name == "coins":
            pictures |= {f"coins_{stage}": picture for stage, picture in stages.items()}
        for title, picture in pictures.items():
            Image.fromarray(picture).save(FOLDER / f"{title}.png", optimize=True)
