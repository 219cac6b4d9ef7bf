"""Random traffic on a sampler: images arrive, leave, and are cancelled, and each must be the image alone."""

import numpy as np

from vqdeploy.runtime.sampler import Item
from vqdeploy.runtime.schedules import SCHEDULES


def random_item(pipeline, rng, image):
    """An image with a condition, seed, options and known codes of its own."""
    options = {
        "temperature": rng.choice([0.0, 0.7, 1.3]),
        "top_k": int(rng.integers(0, 5)),
        "top_p": rng.choice([0.8, 1.0]),
    }
    if "guidance_scale" in pipeline.sampling.options:
        options["guidance_scale"] = float(rng.choice([1.0, 2.5]))
    if "guidance_interval" in pipeline.sampling.options:
        options["guidance_interval"] = int(rng.integers(-1, 12))
    if "steps" in pipeline.sampling.options:
        options |= {"steps": int(rng.integers(1, 7)), "schedule": str(rng.choice(SCHEDULES)), "choice_temperature": 2.0}
    if "more_smooth" in pipeline.sampling.options:
        options["more_smooth"] = int(rng.integers(2))
    known = rng.integers(0, pipeline.codebook_size, pipeline.grid)
    share = rng.choice([0.0, 0.3, 1.0], p=[0.2, 0.4, 0.4])
    raster = pipeline.sampling.kind != "masked"
    known[pipeline.layout.share(share, raster, [image], seed=int(rng.integers(9)))[0]] = -1
    if raster and len(pipeline.grid) == 3 and rng.random() < 0.3:
        known.reshape(-1, pipeline.grid[-1])[-1] = 0  # known behind what is drawn
    if len(pipeline.layout.maps) > 1 and rng.random() < 0.3:
        first = np.prod(pipeline.layout.maps[0])
        known[:first] = rng.integers(0, pipeline.codebook_size, first)  # the coarsest map is known
    condition = pipeline.condition.random(rng, 1)[0]
    return Item(known, condition, int(rng.integers(100)), image, pipeline.options(**options))


def alone(pipeline, item, slots, slot, guided):
    """The image in a batch of the same size whose other slots are free, so that no kernel sums in another order."""
    with pipeline.sampler(slots, guided) as sampler:
        sampler.admit(slot, item)
        while not sampler.step():
            pass
        return sampler.codes(slot)


def takes_guidance(pipeline):
    """Whether its samplers take guidance."""
    return "guidance_scale" in pipeline.sampling.options


def trial(pipeline, seed, slots=3, requests=6, alone=alone):
    """Drives a sampler at random; returns how many images were held against themselves alone."""
    rng = np.random.default_rng(seed)
    waiting = [random_item(pipeline, rng, image) for image in range(requests)]
    running, found = {}, []
    with pipeline.sampler(slots, takes_guidance(pipeline)) as sampler:
        while waiting or running:
            admits = sampler.joins == "any step" or not running
            for slot in rng.permutation(slots)[: rng.integers(4)].tolist():  # so many may arrive
                if admits and waiting and slot not in running:
                    running[slot] = waiting.pop()
                    sampler.admit(slot, running[slot])
                    if rng.random() < 0.1:  # cancelled before its first step
                        sampler.release(slot)
                        waiting.append(running.pop(slot))
            for slot in sampler.step():
                item = running[slot]
                found.append((slot, item, sampler.codes(slot)))
                if sampler.joins == "any step":
                    sampler.release(slot)
                    del running[slot]
            if sampler.joins == "when empty" and running and not any(map(sampler.left, running)):
                for slot in list(running):
                    sampler.release(slot)
                    del running[slot]
            for slot in list(running):
                if rng.random() < 0.03:
                    so_far, known = sampler.codes(slot), running[slot].known
                    assert (so_far[known >= 0] == known[known >= 0]).all() or pipeline.sampling.kind == "masked"
                    sampler.release(slot)
                    del running[slot]
    for slot, item, codes in found:
        assert (codes[item.known >= 0] == item.known[item.known >= 0]).all()
        np.testing.assert_array_equal(codes, alone(pipeline, item, slots, slot, takes_guidance(pipeline)))
    return len(found)
