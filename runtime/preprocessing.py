"""How pictures become the input of a model."""
from typing import NamedTuple

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from models_evit import is_lvvit


class Preprocessing(NamedTuple):
    """How pictures become the input of a model, by default that of DeiT and EViT.

    Attributes:
        mean, std: of the three channels, in [0, 1], for normalisation.
        interpolation: of the resize before evaluation.
        crop_pct: side of the central crop for evaluation relative to that of the resized picture.
        crop_mode: 'center', 'squash' or 'border', as in timm's `create_transform`.
    """
    mean: tuple = IMAGENET_DEFAULT_MEAN
    std: tuple = IMAGENET_DEFAULT_STD
    interpolation: str = 'bicubic'
    crop_pct: float = 224 / 256
    crop_mode: str = 'center'


def pretrained_input(model_name):
    """The side in pixels and the `Preprocessing` of the images that timm's weights of a model were trained with."""
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model_name).to_dict())
    return config.pop('input_size')[-1], Preprocessing(**config)


def input_of(model_name, pretrained):
    """The side in pixels and the `Preprocessing` of images: those of timm's weights, LV-ViT's, or DeiT's."""
    if pretrained or is_lvvit(model_name):
        return pretrained_input(model_name)
    return 224, Preprocessing()
