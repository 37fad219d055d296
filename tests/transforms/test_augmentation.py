import copy
import dataclasses
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import flat_image, smooth_image
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from sktransfer.transforms import augmentation
from sktransfer.transforms.augmentation import (
    POLICIES,
    Augmentation,
    Blur,
    Erase,
    Geometry,
    Policy,
    SensorNoise,
    register_policy,
    resolve_augmentation,
)

JITTER = "v2.Compose([v2.RandomRotation(10), v2.ColorJitter(0.2), v2.ToDtype(torch.uint8)])"
DIGESTS = {
    "light": "1ac7b7c1df8ebd0a46786488d109126b",
    "standard": "b6f4dc75488e4c01f7d1abf88e84625f",
    "aggressive": "fd1ad806b64c83f49a3e517dd1237fcb",
    "industrial": "3768496d99c5c314567bd4d7d36e9069",
}
COPIES = {
    "light": [[92.0, 63.3], [87.2, 55.8], [100.7, 64.7], [92.3, 60.6], [100.6, 67.6], [96.3, 69.3]],
    "standard": [
        [89.6, 61.0],
        [79.6, 47.8],
        [107.0, 62.8],
        [91.0, 55.0],
        [106.7, 67.8],
        [98.2, 71.3],
    ],
    "aggressive": [
        [86.0, 48.5],
        [79.1, 53.5],
        [113.8, 56.5],
        [79.8, 30.7],
        [119.3, 67.7],
        [87.2, 42.6],
    ],
    "industrial": [
        [94.4, 60.0],
        [42.2, 14.9],
        [94.5, 63.8],
        [68.6, 49.0],
        [53.8, 17.0],
        [86.8, 64.8],
    ],
}


def own_function(image):
    """Draw from all three global generators, and write into the image."""
    shift = int(torch.randint(9, ())) + int(np.random.randint(9)) + random.randrange(9)
    return image.add_(shift)


class Stuttering(nn.Module):
    """Draws in many steps, so random numbers drawn by another thread change its result."""

    def forward(self, image):
        for _ in range(200):
            image = image + torch.randint(2, image.shape, dtype=torch.uint8)
        return image


EVERY_KIND = {
    **{policy: policy for policy in POLICIES},
    "v2": v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(10), v2.ColorJitter(0.2)]),
    "v1": v1.Compose([v1.RandomAffine(10, scale=(0.8, 1.2)), v1.GaussianBlur(3)]),
    "erasing": v2.RandomErasing(p=0.9, value="random"),
    "mixed": v2.Compose([Geometry(flip=0.5), v2.RandomPosterize(3), v2.Compose([SensorNoise()])]),
    "noise": v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise()]),
    "module": Stuttering(),
    "function": own_function,
    "lambda": lambda image: torch.rot90(image, int(torch.randint(4, ())), (1, 2)),
}


@pytest.fixture(params=EVERY_KIND)
def augment(request):
    return resolve_augmentation(EVERY_KIND[request.param])


# Seeds and random states


def test_augmentation_depends_on_the_seed(augment):
    image = smooth_image()
    copies = [augment(image, seed) for seed in range(8)]
    for seed in (5, 0, 7):
        assert torch.equal(augment(image, seed), copies[seed])
    distinct = {copy.numpy().tobytes() for copy in copies}
    assert len(distinct) >= 3
    assert all(
        c.dtype == torch.uint8 and c.shape[0] == 3 and type(c) is torch.Tensor for c in copies
    )


def test_augmentation_is_the_same_in_several_threads(augment):
    images = [smooth_image(40, 48, seed) for seed in range(3)]
    work = [(images[i % 3], i) for i in range(24)]
    serial = [augment(*item) for item in work]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda item: augment(*item), reversed(work)))
    assert all(torch.equal(a, b) for a, b in zip(serial, reversed(threaded), strict=True))


def test_augmentation_leaves_random_states_and_image_unchanged(augment):
    image = smooth_image()
    before = image.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    result = augment(image, 3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    result.zero_()
    assert torch.equal(image, before)


def test_augmentation_does_not_depend_on_global_random_states(augment):
    image = smooth_image()
    expected = augment(image, 11)
    torch.rand(5), np.random.rand(5), random.random()
    assert torch.equal(augment(image, 11), expected)


def test_global_random_state_is_restored_after_an_error():
    state = torch.get_rng_state()

    def broken(image):
        torch.rand(3)
        raise RuntimeError("broken on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        resolve_augmentation(broken)(smooth_image(), 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_do_not_use_the_global_generators(policy, monkeypatch):
    """Policies need no lock, so threads do not wait for each other."""

    def refuse(*_):
        raise AssertionError("drew from the global generator")

    monkeypatch.setattr(augmentation, "_globally_seeded", refuse)
    monkeypatch.setattr(augmentation.Part, "make_params", refuse)
    assert resolve_augmentation(policy)(smooth_image(), 2**64 - 1).shape == (3, 64, 80)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63, 2**64 - 1, 2**64, np.uint64(2**63)])
@pytest.mark.parametrize("augment", ["industrial", EVERY_KIND["function"]])
def test_any_seed_is_accepted(augment, seed):
    assert resolve_augmentation(augment)(smooth_image(), seed).shape == (3, 64, 80)


def test_high_bits_of_the_seed_matter():
    """torch's generator uses only the lowest 32 bits."""
    light = resolve_augmentation("light")
    assert not torch.equal(light(smooth_image(), 1), light(smooth_image(), 1 + 2**32))


def test_successive_steps_draw_different_numbers():
    class Add(nn.Module):
        def forward(self, image):
            drawn.append(torch.rand(()).item())
            return image

    drawn = []
    resolve_augmentation(v2.Compose([Add(), Add()]))(smooth_image(), 0)
    assert drawn[0] != drawn[1]


# Policies


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (2, 3), (7, 300), (256, 40), (64, 64)])
def test_policies_keep_any_shape(policy, shape):
    augment = resolve_augmentation(policy)
    for seed in range(12):
        result = augment(smooth_image(*shape), seed)
        assert (result.shape, result.dtype) == ((3, *shape), torch.uint8)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_compute_the_same_for_channels_last_images(policy):
    image = smooth_image()
    last = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(
        resolve_augmentation(policy)(last, 5), resolve_augmentation(policy)(image, 5)
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("value", "object_value"), [(255, 0), (0, 255), (90, 200)])
def test_uncovered_area_has_the_color_of_the_border(policy, value, object_value):
    image = flat_image(value)
    image[:, 24:40, 24:40] = object_value
    geometry = resolve_augmentation(policy).steps[0]
    for seed in range(30):
        moved = geometry.transform(image, geometry.draw(torch.Generator().manual_seed(seed)))
        edges = torch.cat([moved[:, 0], moved[:, -1], moved[:, :, 0], moved[:, :, -1]], 1)
        assert (edges == value).all()
        assert (moved != value).any()


@pytest.mark.parametrize("policy", ["light", "standard"])
@pytest.mark.parametrize("value", [0, 255])
def test_uncovered_corners_have_the_color_of_the_background(policy, value):
    image = flat_image(value)
    image[:, 24:40, 24:40] = 255 - value
    for seed in range(30):
        copy = resolve_augmentation(policy)(image, seed)
        corners = copy[:, :: copy.shape[1] - 1, :: copy.shape[2] - 1]
        assert corners.unique().numel() == 1
        assert abs(int(corners.max()) - value) < 100


def mirrored(policy, seeds=24):
    """Count the augmented images whose bright half changed sides."""
    image = flat_image(40)
    image[:, :, 32:] = 200
    augment = resolve_augmentation(policy)
    copies = [augment(image, seed).float() for seed in range(seeds)]
    return sum((c[:, :, :24].mean() > c[:, :, -24:].mean()).item() for c in copies)


def test_light_never_mirrors_and_the_other_policies_do_half_of_the_time():
    assert mirrored("light") == 0
    assert all(5 <= mirrored(policy) <= 19 for policy in ("standard", "aggressive", "industrial"))


# The digests


def test_registered_policy_works(monkeypatch):
    monkeypatch.setattr(augmentation, "POLICIES", dict(augmentation.POLICIES))
    steps = (Blur(), v2.RandomInvert(p=1.0))
    register_policy("toy", Policy(steps, n_views=5, doc="A toy."))
    toy = resolve_augmentation("toy")
    assert (toy.name, toy.steps, augmentation.resolve_n_views(toy, "auto")) == ("toy", steps, 5)
    assert toy.digest == resolve_augmentation("toy").digest
    assert toy.digest not in [bytes.fromhex(digest) for digest in DIGESTS.values()]
    image = smooth_image()
    assert torch.equal(toy(image, 3), toy(image, 3))
    assert not torch.equal(toy(image, 3), toy(image, 4))
    with pytest.raises(ValueError, match=r"but expected one of .*'industrial', 'toy'"):
        resolve_augmentation("other")
    with pytest.raises(TypeError, match=r"but expected one of .*'industrial', 'toy', None"):
        resolve_augmentation(3)
    with pytest.raises(ValueError, match="Got name='toy', but a policy of this name is registered"):
        register_policy("toy", Policy(steps, n_views=5, doc="A toy."))


def test_docstring_lists_every_policy():
    for name, policy in POLICIES.items():
        assert f'- `"{name}"`: {policy.doc[:30]}' in resolve_augmentation.__doc__


def test_policy_digests_are_unchanged():
    """If a policy changes, raise `_AUGMENTATION_VERSION` and update these digests."""
    digests = {policy: resolve_augmentation(policy).digest.hex() for policy in POLICIES}
    assert digests == DIGESTS


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_outputs_are_unchanged(policy):
    """If a policy's output changes, raise `_AUGMENTATION_VERSION` and update these gray values."""
    x, y = torch.linspace(0, 255, 60), torch.linspace(0, 120, 48)[:, None]
    image = torch.stack([x.expand(48, 60), y.expand(48, 60), (255 - x).expand(48, 60)])
    copies = [resolve_augmentation(policy)(image.to(torch.uint8), seed) for seed in range(6)]
    corners = [[c[:, :24, :30].float().mean(), c[:, 24:, 30:].float().std()] for c in copies]
    torch.testing.assert_close(
        torch.tensor(corners), torch.tensor(COPIES[policy]), atol=0.3, rtol=0
    )


@pytest.mark.parametrize("shape", [(48, 60), (61, 47), (40, 40)])
@pytest.mark.parametrize("policy", POLICIES)
def test_geometry_of_the_center_equals_the_center_of_the_whole(policy, shape):
    """Only geometry commutes with cropping: other steps depend on the whole image."""
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    whole = resolve_augmentation(policy)
    geometry = dataclasses.replace(whole, steps=whole.steps[:1])
    for seed in range(8):
        expected = tvf.center_crop(geometry(image, seed), [40, 40]).short()
        center = geometry(image, seed, (40, 40)).short()
        assert (center - expected).abs().max() <= 1  # of 255, by rounding
        assert whole(image, seed, (40, 40)).shape[1:] in ((40, 40), shape)


def test_digest_depends_on_the_augmentation_version(monkeypatch):
    augments = ["light", v2.RandomRotation(10)]
    before = [resolve_augmentation(augment).digest for augment in augments]
    monkeypatch.setattr(
        augmentation, "_AUGMENTATION_VERSION", augmentation._AUGMENTATION_VERSION + 1
    )
    assert all(resolve_augmentation(a).digest != b for a, b in zip(augments, before, strict=True))


@pytest.mark.slow
def test_digest_of_torchvision_transforms_is_the_same_in_any_process():
    script = (
        "import torch\nfrom torchvision.transforms import v2\n"
        "from sktransfer.transforms.augmentation import *\n"
        f"print(resolve_augmentation({JITTER}).digest.hex())\n"
        "print(resolve_augmentation('aggressive').digest.hex())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    expected = [resolve_augmentation(augment).digest for augment in (eval(JITTER), "aggressive")]
    assert [bytes.fromhex(line) for line in run.stdout.split()] == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: v2.RandomRotation(10), lambda: v2.RandomRotation(11)),
        (lambda: v2.RandomRotation(10), lambda: v2.RandomRotation(10, fill=255)),
        (lambda: v2.ColorJitter(0.2), lambda: v2.ColorJitter(0, 0.2)),
        (lambda: v1.ColorJitter(0.2), lambda: v2.ColorJitter(0.2)),
        (lambda: SensorNoise(), lambda: SensorNoise(p=0.5)),
        (lambda: Blur(0.01), lambda: Blur(0.02)),
        (lambda: v2.Compose([Blur(), Erase()]), lambda: v2.Compose([Erase(), Blur()])),
        (lambda: v2.RandomApply([Blur()], 0.1), lambda: v2.RandomApply([Blur()], 0.2)),
        (lambda: v2.Lambda(torch.neg), lambda: v2.Lambda(torch.abs)),
        (lambda: Constant(1.0), lambda: Constant(2.0)),
        (lambda: v2.AutoAugment(), lambda: v2.AutoAugment(v2.AutoAugmentPolicy.SVHN)),
    ],
)
def test_digest_depends_on_the_parameters(one, other):
    assert resolve_augmentation(one()).digest == resolve_augmentation(one()).digest
    assert resolve_augmentation(one()).digest != resolve_augmentation(other()).digest


def Constant(value):  # noqa: N802
    """Build a torch module that holds a tensor."""
    layer = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parametrize(
    "augment",
    [
        lambda image: image,
        own_function,
        Stuttering(),
        Stuttering().forward,
        v2.Lambda(lambda image: image),
        v2.Compose([v2.RandomRotation(10), Stuttering()]),
    ],
)
def test_digest_of_unidentifiable_functions_is_unique_per_object(augment):
    first, second = resolve_augmentation(augment), resolve_augmentation(augment)
    assert len(first.digest) == 16
    assert first.digest != second.digest
    assert resolve_augmentation(first) is first
    assert copy.deepcopy(first).digest == first.digest


def test_digest_does_not_draw_from_the_global_generators():
    state = random.getstate()
    resolve_augmentation(own_function)
    assert random.getstate() == state


@pytest.mark.parametrize("kind", [kind for kind in EVERY_KIND if kind != "lambda"])
def test_pickled_augmentation_is_equal(kind):
    augment = resolve_augmentation(EVERY_KIND[kind])
    loaded = pickle.loads(pickle.dumps(augment))
    assert loaded.digest == augment.digest
    assert torch.equal(loaded(smooth_image(), 9), augment(smooth_image(), 9))


# Arguments of users


def test_resolve_augmentation_returns_none_and_resolved_ones_unchanged():
    assert resolve_augmentation(None) is None
    light = resolve_augmentation("light")
    assert isinstance(light, Augmentation)
    assert resolve_augmentation(light) is light
    assert light.name == "light"
    assert [resolve_augmentation(EVERY_KIND[kind]).name for kind in ("v2", "function")] == [
        "Compose",
        "own_function",
    ]


def test_unknown_policy_is_rejected_with_a_suggestion():
    expected = (
        "Got augment='standart', but expected one of None, 'light', 'standard', 'aggressive', "
        "'industrial'; did you mean 'standard'?"
    )
    with pytest.raises(ValueError, match="Got augment") as caught:
        resolve_augmentation("standart")
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("augment", "remedy"),
    [
        (3, r"\(3, H, W\)$"),
        (True, r"\(3, H, W\)$"),
        ([v2.ColorJitter()], "; put them into a v2.Compose$"),
        (v2.RandomRotation, r"; make one: RandomRotation\(...\)$"),
    ],
)
def test_values_that_are_not_transforms_are_rejected(augment, remedy):
    start = "^Got augment=.*, but expected one of 'light', 'standard', 'aggressive', 'industrial', "
    with pytest.raises(TypeError, match=f"{start}None, or a transform .*{remedy}"):
        resolve_augmentation(augment)


@pytest.mark.parametrize(
    ("augment", "error", "message"),
    [
        (v2.ToPILImage(), TypeError, "Got Image, but augment='ToPILImage' should return a uint8 "),
        (v2.Grayscale(), ValueError, r"Got shape \(1, 64, 80\), .*; for gray, append v2.RGB\(\)"),
        (v2.Lambda(torch.Tensor.float), ValueError, r"Got torch.float32 from \d+ to 2\d\d, "),
        (v2.Lambda(torch.Tensor.int), ValueError, "Got torch.int32 from "),
        (lambda image: None, TypeError, "Got NoneType, but augment='<lambda>' should return "),
        (lambda image: image[:, :0], ValueError, r"Got shape \(3, 0, 80\), "),
        (lambda image: image[None], ValueError, r"Got shape \(1, 3, 64, 80\), "),
        (lambda image: image / 255 - 0.5, ValueError, "leave out v2.Normalize"),
        (lambda image: image * torch.nan, ValueError, "from nan to nan"),
    ],
)
def test_transform_that_does_not_return_an_image_is_rejected(augment, error, message):
    with pytest.raises(error, match=message):
        resolve_augmentation(augment)(smooth_image(), 0)


def test_floats_and_tv_tensors_are_converted():
    image = smooth_image()
    floats = resolve_augmentation(v2.ToDtype(torch.float32, scale=True))(image, 0)
    images = resolve_augmentation(v2.ToImage())(image, 0)
    grads = resolve_augmentation(lambda p: (p / 255).requires_grad_())(image, 0)
    for result in (floats, images, grads):
        assert type(result) is torch.Tensor
        assert torch.equal(result, image)
        assert not result.requires_grad


def test_custom_transform_may_change_the_size():
    cropped = resolve_augmentation(v2.RandomResizedCrop(24))(smooth_image(), 0)
    assert cropped.shape == (3, 24, 24)
