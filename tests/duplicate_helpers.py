"""Crops of photographs, and ways to copy them, for the tests of duplicates and leaks."""

import io

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

CHINA, FLOWER = (Image.fromarray(image) for image in load_sample_images().images)


def tile(number):
    """Crop one of 24 images from the two photographs."""
    source = (CHINA, FLOWER)[number % 2]
    row, column = divmod(number // 2, 4)
    return source.crop((160 * column, 140 * row, 160 * column + 160, 140 * row + 140))


# The background of the flower is so smooth that two of its tiles are alike.
TILES = [np.asarray(tile(number)) for number in range(15)]


def recompressed(image, quality=60):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def cropped(image, share=0.05):
    width, height = image.size
    return image.crop((0, round(share * height), round((1 - share) * width), height))


COPIES = {
    "identical": (lambda image: image, "identical"),
    "resized": (lambda image: image.resize((90, 79)), "copy"),
    "stretched": (lambda image: image.resize((160, 160)), "copy"),
    "recompressed": (recompressed, "copy"),
    "cropped": (cropped, "copy"),
    "mirrored": (ImageOps.mirror, "mirrored"),
    "mirrored and recompressed": (lambda p: recompressed(ImageOps.mirror(p)), "mirrored"),
}
