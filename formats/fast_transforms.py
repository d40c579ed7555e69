"""The training transform on arrays, several times as fast as on Pillow's pictures, with the same random draws.

It is for `build_dataset(fast_transforms=True)`. The data set's decoder is `EncodedImage`, so that a file is decoded
when its crop is known; `on_arrays` turns timm's transform into the steps here. Between the steps an image is an array,
uint8 (H, W, 3). docs/data.md says by how much each step differs from Pillow's.
"""
import random

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from formats.decoding import decode_picture

SCALES = 8, 4, 2                                       # at which a JPEG decodes faster than whole


# --- Decode, crop, resize, mirror -----------------------------------------------------------------------------------

class EncodedImage:
    """An image file to be decoded later; `EncodedImage(data, where)` takes the place of `decode_picture(data, where)`.

    Attributes:
        size: (width, height) in pixels.
        is_jpeg: whether simplejpeg can decode it: grey or colour, and of a size that Pillow accepts.
    """

    def __init__(self, data, where):
        self.data, self.where, self.is_jpeg, self.picture = data, where, False, None
        if data.startswith(b'\xff\xd8\xff'):
            try:
                height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
                self.size = width, height
                self.is_jpeg = colors in ('YCbCr', 'Gray') and width * height <= Image.MAX_IMAGE_PIXELS
            except ValueError:                         # Pillow may read it, or say why not
                pass
        if not self.is_jpeg:
            self.decode_by_pillow()

    def decode_by_pillow(self):
        self.picture = decode_picture(self.data, self.where)
        self.size = self.picture.size

    def crop(self, top, left, height, width, size):
        """A part of the image, uint8 (h, w, 3).

        It has the size of the part or, if it is a JPEG, a half, a quarter or an eighth of it that is at least `size`,
        (height, width); then its edges are rounded to whole pixels.
        """
        if self.is_jpeg:
            scale = next((scale for scale in SCALES if height >= scale * size[0] and width >= scale * size[1]), 1)
            full_width, full_height = self.size
            try:
                pixels = simplejpeg.decode_jpeg(self.data, min_height=-(-full_height // scale),
                                                min_width=-(-full_width // scale))
                top, bottom, left, right = (round(edge / scale) for edge in (top, top + height, left, left + width))
                return pixels[top:bottom, left:right]
            except ValueError:                         # a warning of libjpeg, which Pillow heeds or not
                self.decode_by_pillow()
                self.is_jpeg = False
        return np.array(self.picture.crop((left, top, left + width, top + height)))


class DecodedCrop(RandomResizedCropAndInterpolation):
    """The random crop of timm's random resized crop: `EncodedImage` or picture → array.

    Modifications: `get_params` takes an EncodedImage, too; `Resize` follows as a step of its own.
    """

    @staticmethod
    def get_params(image, scale, ratio):
        width, height = image.size
        shape = torch.empty(1, height, width, device='meta')               # timm asks for nothing but the size
        return RandomResizedCropAndInterpolation.get_params(shape, scale, ratio)

    def __call__(self, image):
        cv2.setNumThreads(0)                           # in the process that works; a core has a worker of its own
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        if isinstance(image, EncodedImage):
            return image.crop(top, left, height, width, self.size)
        return np.array(image.crop((left, top, left + width, top + height)))


class Resize:
    """Array → array (*size, 3), by torch's kernels, whose weights have 16 bits and Pillow's 22.

    (OpenCV's are no choice here: its cubic one aliases where it shrinks, the one for areas takes three times as long.)
    """

    def __init__(self, size, interpolation):
        self.size, self.interpolation = size, interpolation

    def __call__(self, pixels):
        interpolation = self.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0)      # channels last
        return F.resize(tensor, self.size, interpolation)[0].permute(1, 2, 0).numpy()


class Mirror(transforms.RandomHorizontalFlip):
    """torchvision's random mirroring, of an array."""

    def forward(self, pixels):
        return cv2.flip(pixels, 1) if torch.rand(1) < self.p else pixels


class ToTensor:
    """Array → tensor, uint8 (3, H, W)."""

    def __call__(self, pixels):
        return torch.from_numpy(np.stack(cv2.split(pixels)))


class ByPillow:
    """A step on pictures that has none on arrays."""

    def __init__(self, step):
        self.step = step

    def __call__(self, pixels):
        return np.array(self.step(Image.fromarray(pixels)))


# --- Colours --------------------------------------------------------------------------------------------------------
# Each operation has the name and the arguments of timm's: an array, the value that was drawn, further settings. Values
# are computed as by Pillow, which truncates where it blends. The results of tables are equal to Pillow's, except that
# the mean for `contrast` may be rounded otherwise; those of `color` and `sharpness` differ by a level here and there.

LEVELS = np.arange(256)


def table(values):
    """Values of 256 levels, for each channel or for all, as a table of cv2.LUT."""
    return np.clip(values, 0, 255).astype(np.uint8)


def auto_contrast(pixels, **_):
    low = pixels.min(0).min(0).astype(float)           # (3,); over both at once, numpy takes forty times as long
    high = pixels.max(0).max(0).astype(float)
    scale = 255 / np.maximum(high - low, 1)
    stretched = LEVELS[:, None] * scale - low * scale
    return cv2.LUT(pixels, table(np.where(high > low, stretched, LEVELS[:, None]))[None])


def equalize(pixels, **_):
    lut = np.empty((1, 256, 3), np.uint8)
    for channel in range(3):
        counts = cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        lut[0, :, channel] = table((step // 2 + counts.cumsum() - counts) // step) if step else LEVELS
    return cv2.LUT(pixels, lut)


def invert(pixels, **_):
    return cv2.bitwise_not(pixels)


def solarize(pixels, thresh, **_):
    return cv2.LUT(pixels, table(np.where(LEVELS < thresh, LEVELS, 255 - LEVELS)))


def solarize_add(pixels, add, thresh=128, **_):
    return cv2.LUT(pixels, table(np.where(LEVELS < thresh, LEVELS + add, LEVELS)))


def posterize(pixels, bits_to_keep, **_):
    return cv2.LUT(pixels, table(LEVELS & -(1 << 8 - bits_to_keep))) if bits_to_keep < 8 else pixels


def brightness(pixels, factor, **_):
    return cv2.LUT(pixels, table(LEVELS * factor))


def contrast(pixels, factor, **_):
    mean = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.LUT(pixels, table(mean + factor * (LEVELS - mean)))


def color(pixels, factor, **_):
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return blend(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), pixels, factor)


def desaturate(pixels, factor, **_):
    return color(pixels, min(1., max(0., 1. - factor)))


def sharpness(pixels, factor, **_):
    smooth = cv2.filter2D(pixels, -1, np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):          # which Pillow does not filter
        smooth[edge] = pixels[edge]
    return blend(smooth, pixels, factor)


def blend(degenerate, pixels, factor):
    """Pillow's blend, whose values are truncated; OpenCV rounds, so half a level is taken off before."""
    return cv2.addWeighted(pixels, factor, degenerate, 1 - factor, -0.499)


def gaussian_blur(pixels, factor, **_):
    return cv2.GaussianBlur(pixels, (0, 0), factor) if factor else pixels


def gaussian_blur_rand(pixels, factor, **_):
    return gaussian_blur(pixels, random.uniform(0.1, 2.0 * factor))


class ColorJitter(transforms.ColorJitter):
    """torchvision's colour jitter, without a change of hue, of an array."""

    def forward(self, pixels):
        order, *factors, _ = self.get_params(self.brightness, self.contrast, self.saturation, self.hue)
        for number in order:
            if number < 3 and factors[number] is not None:
                pixels = (brightness, contrast, color)[number](pixels, factors[number])
        return pixels


# --- Geometry -------------------------------------------------------------------------------------------------------

def affine(pixels, matrix, fillcolor, resample):
    """Pillow's `transform` by an affine matrix: where in the input, in pixels, a point of the output lies.

    The interpolation is bilinear in any case: cubic, all of RandAugment would take twice as long.

    Args:
        matrix: a, b, c, d, e, f: the point (x, y) lies at (ax + by + c, dx + ey + f).
        resample: an interpolation of Pillow, or a tuple of which timm draws one.
    """
    if isinstance(resample, (tuple, list)):
        random.choice(resample)                        # for the draws after it
    matrix = np.reshape(matrix, (2, 3)).astype(float)
    matrix[:, 2] += (matrix[:, 0] + matrix[:, 1] - 1) / 2                  # OpenCV's points are the centres of pixels
    return cv2.warpAffine(pixels, matrix, pixels.shape[1::-1], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_CONSTANT, borderValue=fillcolor)


def shear_x(pixels, factor, **options):
    return affine(pixels, (1, factor, 0, 0, 1, 0), **options)


def shear_y(pixels, factor, **options):
    return affine(pixels, (1, 0, 0, factor, 1, 0), **options)


def translate_x_abs(pixels, shift, **options):
    return affine(pixels, (1, 0, shift, 0, 1, 0), **options)


def translate_y_abs(pixels, shift, **options):
    return affine(pixels, (1, 0, 0, 0, 1, shift), **options)


def translate_x_rel(pixels, share, **options):
    return translate_x_abs(pixels, share * pixels.shape[1], **options)


def translate_y_rel(pixels, share, **options):
    return translate_y_abs(pixels, share * pixels.shape[0], **options)


def rotate(pixels, degrees, **options):
    height, width = pixels.shape[:2]
    radians = np.deg2rad(degrees)
    cosine, sine = np.cos(radians), np.sin(radians)
    x, y = width / 2, height / 2                       # stay where they are
    return affine(pixels, (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y),
                  **options)


# --- timm's transform -----------------------------------------------------------------------------------------------

OPERATIONS = {operation.__name__: operation for operation in (
    auto_contrast, equalize, invert, solarize, solarize_add, posterize, brightness, contrast, color, desaturate,
    sharpness, gaussian_blur, gaussian_blur_rand, shear_x, shear_y, translate_x_abs, translate_y_abs, translate_x_rel,
    translate_y_rel, rotate)}


def on_arrays(transform):
    """The steps of a training transform of `build_transform` as steps on arrays.

    timm's objects of RandAugment and AutoAugment stay, with other functions for their operations; so the draws are
    theirs. AugMix, which mixes pictures, stays on pictures.
    """
    return transforms.Compose([new for step in transform.transforms for new in _steps(step)])


def _steps(step):
    if isinstance(step, RandomResizedCropAndInterpolation):
        return DecodedCrop(step.size, step.scale, step.ratio), Resize(step.size, step.interpolation)
    if isinstance(step, transforms.RandomCrop):        # of a small picture, which is not resized
        return step, np.array
    if isinstance(step, transforms.RandomHorizontalFlip):
        return Mirror(step.p),
    if isinstance(step, (RandAugment, AutoAugment)):
        policies = step.policy if isinstance(step, AutoAugment) else [step.ops]
        for operation in (operation for policy in policies for operation in policy):
            operation.aug_fn = OPERATIONS[operation.aug_fn.__name__]
        return step,
    if isinstance(step, transforms.ColorJitter):
        return ColorJitter(step.brightness, step.contrast, step.saturation),
    if isinstance(step, MaybePILToTensor):
        return ToTensor(),
    return ByPillow(step),
