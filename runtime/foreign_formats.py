"""Weights of other code bases: the part of them that a model of timm has, under its names."""
import contextlib
import inspect
import io
import re
import sys

import timm

from evit.position_embedding import antialiases
from runtime.distributed import log
from runtime.utils import InputError, one_line

# What only the pretraining needs: of MAE, BEiT and EVA, iBOT, MoCo
PRETRAINING = re.compile(r'(decoder|mask_token|masked_embed|lm_head|predictor|projector)')


def convert_weights(weights, model, source):
    """A state dict in the format of its own code → in that of `model`, by timm's conversion for it.

    Position embeddings are resized as `resize_pos_embed` does. What the model has no place for because only the
    pretraining needed it is left out and reported: a decoder, a mask token, a projection head. Raises InputError if
    the conversion fails.
    """
    module = timm.model_entrypoint(model.pretrained_cfg['architecture']).__module__
    convert = getattr(sys.modules[module], 'checkpoint_filter_fn', None)
    converted = dict(weights)
    if convert is not None:
        options = {'antialias': antialiases(model), 'adapt_layer_scale': True}
        options = {name: options[name] for name in options if name in inspect.signature(convert).parameters}
        try:
            with contextlib.redirect_stdout(io.StringIO()):                # timm prints parameters that are missing
                converted = dict(convert(converted, model, **options))     # which may change its argument
        except Exception as error:
            raise InputError(f'{source} is a checkpoint of another model: {one_line(error)}') from None
    own = model.state_dict()
    unneeded = tuple(f'{name}.' for name in classifiers(model))            # a projection head, with other names
    if 'fc_norm.weight' in own and 'norm.weight' not in own and 'fc_norm.weight' not in converted:
        unneeded += 'norm.',                           # as in MAE's recipe: averaged tokens get a new norm
    left_out = [key for key in (weights | converted)
                if key not in own and (PRETRAINING.match(key) or key.startswith(unneeded))]
    say_left_out(source, left_out)
    return {key: value for key, value in converted.items() if key not in left_out}


def under_prefix(weights, model, source):
    """The part of a state dict that is the model, without its prefix, such as DINO's 'backbone.'.

    timm knows those that begin with 'visual.'. Of MoCo's two encoders, its own recipe takes 'base_encoder.'.
    """
    anchor = next((key for key in model.state_dict() if '.' in key), '')
    prefixes = sorted(key[:-len(anchor)] for key in weights if key.endswith(f'.{anchor}'))
    if anchor in weights or not prefixes or prefixes[0].startswith('visual.'):
        return weights
    prefix = prefixes[0]
    log(f'{source}: taken is what is under {prefix[:-1]}')
    say_left_out(source, [key for key in weights if not key.startswith(prefix)])
    return {key[len(prefix):]: value for key, value in weights.items() if key.startswith(prefix)}


def say_left_out(source, keys):
    if keys:
        names = sorted({key.split('.')[0] for key in keys})
        log(f'{source}: left out {", ".join(names)} (tensors: {len(keys)})')


def classifiers(model):
    """The names of a model's classifying layers."""
    names = model.pretrained_cfg['classifier']
    return (names,) if isinstance(names, str) else names
