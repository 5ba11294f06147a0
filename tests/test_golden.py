"""The network against the Keras reference, stage by stage and as a whole; see comparison.py."""

import hashlib

import numpy as np
import pytest
from comparison import CONFIGS, STAGES, Case, build_model, read_image
from conftest import DATA, SHARED, load_golden, needs_shared
from keras_weights import write_h5

import utils

PHOTO = needs_shared("golden/photo1.jpg")
CASES = [
    "small synth",
    pytest.param("small photo1", marks=PHOTO),
    pytest.param("coco photo1", marks=[pytest.mark.slow, PHOTO]),
    pytest.param("coco synth", marks=[pytest.mark.slow, PHOTO]),
]


@pytest.fixture(scope="module")
def small_model(small_h5):
    return build_model("small", small_h5)


@pytest.fixture(scope="module")
def coco_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "coco.h5"
    write_h5("coco", path)
    return build_model("coco", path)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    config, name = request.param.split()
    return Case(request.getfixturevalue(f"{config}_model"), name)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_is_that_of_the_reference(case, stage):
    """`pytest -rP -m "" tests/test_golden.py` prints what docs/equality.md shows."""
    differences = list(getattr(case, stage)())
    for difference in differences:
        print(f"{case.config} {case.name}: {difference}")
    assert not [str(difference) for difference in differences if not difference.holds]


@pytest.mark.parametrize(
    "name",
    [
        "small synth",
        "coco synth",
        pytest.param("small photo1", marks=PHOTO),
        pytest.param("coco photo1", marks=PHOTO),
    ],
)
def test_the_network_sees_the_pixels_of_the_reference(name):
    """To the last grey level, after resizing and padding."""
    name, image_name = name.split()
    config = CONFIGS[name]()
    sides = {"min_dim": config.IMAGE_MIN_DIM, "max_dim": config.IMAGE_MAX_DIM}
    resized = utils.resize_image(read_image(name, image_name), **sides).image
    expected = load_golden(f"inference_{name}.npz")[f"{image_name}/sha256_resized"]
    assert hashlib.sha256(resized.tobytes()).hexdigest() == expected


@needs_shared("golden")
def test_the_repository_holds_a_part_of_the_reference():
    for path in DATA.glob("*.npz"):
        (source,) = (SHARED / "golden").rglob(path.name)
        part, whole = load_golden(path.name), load_golden(path.name, source.parent)
        for key, array in part.items():
            np.testing.assert_array_equal(array, whole[key], err_msg=f"{path.name} {key}")
            assert array.dtype == whole[key].dtype
