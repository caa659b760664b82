"""An image is a function of its job: not of what was fused before, nor of its batch-mates."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.e2e.conftest import Service

LORAS = ("stripes", "outline", "heart", "dusk")


def pixels(image: Image.Image) -> npt.NDArray[np.int16]:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def test_the_same_job_gives_identical_pixels_after_other_sets_were_fused(service: Service) -> None:
    plain = pixels(service.draw())
    styled = pixels(service.draw(loras=[{"name": "stripes", "scale": 0.8}]))
    for name in LORAS:
        service.draw(loras=[{"name": name, "scale": 1.1}, {"name": "outline", "scale": -0.4}])
    assert (pixels(service.draw()) == plain).all()
    assert (pixels(service.draw(loras=[{"name": "stripes", "scale": 0.8}])) == styled).all()
    assert (plain != styled).any()


def test_alone_or_in_a_batch_of_four_an_image_is_the_same_within_one_step(service: Service) -> None:
    prompts = [
        f"a {colour} {shape} on a white background"
        for colour, shape in (("red", "circle"), ("green", "square"), ("blue", "star"), ("black", "triangle"))
    ]
    alone = [pixels(service.draw(prompt, seed=number)) for number, prompt in enumerate(prompts)]
    # a long job holds the worker, so that the four wait together and are claimed together
    holder = service.submit(steps=100, loras=[{"name": "dusk", "scale": 1}])
    service.wait_for(holder, lambda view: view["state"] == "running")
    ids = [service.submit(prompt, seed=number) for number, prompt in enumerate(prompts)]
    views = service.wait(ids)
    assert [view["result"]["batch_size"] for view in views] == [4] * 4
    for view, expected in zip(views, alone, strict=True):
        assert np.abs(pixels(service.images(view)[0]) - expected).max() <= 1


def test_scale_zero_is_no_lora_at_all(service: Service) -> None:
    plain = service.submit()
    zero = service.submit("a red circle on a blue background <lora:stripes:0>")
    views = service.wait([plain, zero])
    assert views[1]["result"]["loras"] == []
    assert (pixels(service.images(views[0])[0]) == pixels(service.images(views[1])[0])).all()


def test_tags_and_fields_mean_the_same(service: Service) -> None:
    by_tag = service.draw("a red circle on a blue background <lora:stripes:0.5> <lora:outline:1:0.5>")
    by_field = service.draw(loras=[{"name": "outline", "te": 1, "unet": 0.5}, {"name": "stripes", "scale": 0.5}])
    assert (pixels(by_tag) == pixels(by_field)).all()


def test_each_image_of_a_job_has_its_own_seed(service: Service) -> None:
    three = service.images(service.wait([service.submit(images=3, seed=40)])[0])
    second = service.draw(seed=41)
    assert np.abs(pixels(three[1]) - pixels(second)).max() <= 1
    assert (pixels(three[0]) != pixels(three[2])).any()
