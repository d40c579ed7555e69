"""Models by name and flags: timm's, as they are or turned into an EViT."""
import argparse
import difflib
import inspect
import logging
import re

import timm
import torch
from timm.layers import to_2tuple

from evit.reorganization import SCORES, WAYS
from evit.settings import TokenSettings
from models_evit import TOKEN_ARGUMENTS, VARIANTS, to_evit
from runtime.arguments import block_numbers, keep_rate, key_value, positive, timm_model, token_counts
from runtime.distributed import log
from runtime.preprocessing import input_of
from runtime.utils import InputError, one_line

MODEL_FLAGS = 'model', 'pretrained', 'model_kwargs', 'input_size'

DEFAULT_MODEL = 'deit_small_patch16_shrink_base'

# Arguments of timm's models that follow from flags or from the data
RESERVED = {'num_classes', 'drop_rate', 'drop_path_rate', 'img_size', 'in_chans', 'pretrained', 'checkpoint_path',
            'pretrained_cfg', 'pretrained_cfg_overlay', *TOKEN_ARGUMENTS}


def create_model(name, *, pretrained=False, new_head=True, input_size=None, tokens=None, grad_checkpointing=False,
                 model_kwargs=None, **options):
    """A model of timm on the CPU.

    Args:
        name: timm's, or one of models_evit.py.
        pretrained: whether to load timm's weights.
        new_head: whether the head may be new where the weights know other classes.
        input_size: side of the images in pixels; None for the model's own. Only some models need to know it.
        tokens: None for the model as it is, or the `TokenSettings` of an EViT.
        grad_checkpointing: whether to recompute activations in the backward pass.
        model_kwargs: more arguments of the model, of --model-kwargs.
        options: arguments of the model that follow from flags; None for its default.
    Raises:
        InputError: the model cannot be built so, or its weights cannot be had.
    """
    model_kwargs = model_kwargs or {}
    if reserved := RESERVED & model_kwargs.keys():
        raise InputError(f'--model-kwargs cannot set {min(reserved)}: it has a flag of its own, or follows from the '
                         'data')
    if timm.get_pretrained_cfg(name).fixed_input_size:
        options['img_size'] = input_size
    if pretrained:
        num_classes = timm.get_pretrained_cfg(name).num_classes
        if num_classes != options['num_classes']:
            explain_new_head(name, num_classes, options['num_classes'], new_head)
            if model_kwargs:
                # With a new head, timm would load weights that lack a part of the model; with their own it refuses them
                create_from_timm(name, pretrained, options | {'num_classes': num_classes}, model_kwargs)
    model = create_from_timm(name, pretrained, options, model_kwargs)
    if getattr(model, 'global_pool', None) == '':
        raise InputError(f'--model-kwargs global_pool=: {name} would not classify without pooling')
    if tokens is not None:
        try:
            to_evit(model, settings=tokens)
        except ValueError as error:
            raise InputError(f'--model {name}: {one_line(error)}') from None
    if grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError):
            raise InputError(f'--grad-checkpointing: {name} has none') from None
    patch_size = to_2tuple(getattr(getattr(model, 'patch_embed', None), 'patch_size', 1))
    if input_size and 'img_size' in options and any(input_size % side for side in patch_size):
        raise InputError(f'--input-size {input_size} is no multiple of the patch size {patch_size[0]}')
    return model


def create_from_timm(name, pretrained, options, model_kwargs):
    """`timm.create_model`, whose errors become one line; without stochastic depth if the model has none."""
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)           # each retry, before the error
    while True:
        try:
            return timm.create_model(name, pretrained=pretrained, **options, **model_kwargs)
        except Exception as error:
            given = f' with --model-kwargs {model_kwargs}' if model_kwargs else ''
            if "'drop_path_rate'" in str(error) and options.get('drop_path_rate') is not None:
                log(f'note: {name} takes no --drop-path')
                options = options | {'drop_path_rate': None}
            elif (unknown := re.search("unexpected keyword argument '(\\w+)'|$", str(error))[1]) in model_kwargs:
                raise InputError(f'--model-kwargs: {name} has no argument {unknown}'
                                 f'{arguments_of(name, unknown)}') from None
            elif pretrained:
                raise InputError(f'--pretrained: the weights of {name}{given} cannot be loaded: {one_line(error)}'
                                 ) from None
            elif model_kwargs or isinstance(error, (ValueError, AssertionError)):
                raise InputError(f'--model {name}{given}: {one_line(error)}') from None
            else:
                raise


def arguments_of(name, wrong):
    """', but …': the arguments of a model of timm, first the one that `wrong` resembles; '' if they are not known."""
    try:
        with torch.device('meta'):                     # without weights
            kinds = type(timm.create_model(name)).__mro__
    except Exception:                                  # some models need values
        return ''
    kinds = kinds[:kinds.index(torch.nn.Module)]
    known = sorted({key for kind in kinds for key in inspect.signature(kind.__init__).parameters}
                   - RESERVED - {'self', 'args', 'kwargs'})
    similar = difflib.get_close_matches(wrong, known, n=1)
    return f', but {", ".join(similar + [key for key in known if key not in similar])}'


def explain_new_head(name, known, num_classes, new_head):
    """Say that timm's weights classify `known` classes, not `num_classes`; InputError if the head must not be new."""
    message = f"timm's weights of {name} know {known} classes, the data has {num_classes}"
    if not new_head:
        raise InputError(f'--eval --pretrained: {message}; finetune them first')
    log(f'note: {message}: the head is new')


# --- Flags ----------------------------------------------------------------------------------------------------------

def add_model_arguments(parser):
    """Add the flags of tokens and model; → the two groups."""
    tokens = parser.add_argument_group('tokens (one of these flags makes an EViT of a model of timm)')
    add, on_off = tokens.add_argument, argparse.BooleanOptionalAction
    add('--base-keep-rate', type=keep_rate, help='fraction of tokens that a reorganising block keeps (default: of the '
        'model, or 0.7)')
    add('--fuse-token', action=on_off, help='fuse the other tokens into one instead of dropping them (default: off)')
    add('--merge-token', action=on_off, help='merge the tokens that are most similar to others into these (default: '
        'off)')
    add('--drop-loc', type=block_numbers, help='numbers of the blocks that reorganise tokens, from 0 (default: '
        'depth/4, depth/2, 3·depth/4; to merge, 0, 1, 3, 5, … to 3·depth/4)')
    add('--keep-schedule', choices=['stages', 'uniform'], help='in these blocks (default), or spread over all blocks')
    add('--token-counts', type=token_counts, metavar='N,N,…|FILE.json', help='instead of rate and blocks: how many '
        'tokens leave each block, class and fused token and registers included')
    add('--token-way', choices=[*WAYS], help='what becomes of the other tokens, by name (default: drop)')
    add('--token-score', choices=[*SCORES], help='what ranks the tokens (default: class_attention)')
    model = parser.add_argument_group('model')
    add = model.add_argument
    add('--model', type=timm_model, help=f'a model of models_evit.py or any timm model (default: {DEFAULT_MODEL})')
    add('--pretrained', action='store_true', help="take images as timm's weights of the model do, and start from these "
        'weights unless others are named')
    add('--model-kwargs', nargs='+', action='extend', type=key_value, metavar='KEY=VALUE',
        help='more arguments of the model that have no flag, such as patch_size=8 embed_dim=96')
    add('--input-size', type=positive(int), help="pixels (default: 224, with --pretrained the weights')")
    return tokens, model


def fill_model_arguments(args, parser, trained=None, as_evit=False):
    """Complete the flags of `add_model_arguments`; a checkpoint, if there is one, gives those that are not named.

    Args:
        args: the Namespace.
        parser: for errors.
        trained: the flags of a checkpoint, a dict in which any may be missing.
        as_evit: whether the model becomes an EViT in any case.
    Returns:
        whether the model or a flag asks for an EViT.
    """
    trained = trained or {}
    if args.token_counts:
        for name in ('base_keep_rate', 'drop_loc', 'keep_schedule'):
            if getattr(args, name) is not None:
                parser.error(f'--token-counts takes no {flag_of(name)}')
    for name in MODEL_FLAGS:
        setattr(args, name, getattr(args, name) or trained.get(name))
    try:
        args.model, args.pretrained = timm_model(args.model or DEFAULT_MODEL), bool(args.pretrained)
    except argparse.ArgumentTypeError as error:        # the name in the checkpoint
        parser.error(f'the model of the checkpoint {error}; give --model')
    args.model_kwargs = dict(args.model_kwargs or {})
    args.input_size = args.input_size or input_of(args.model, args.pretrained)[0]
    try:
        asked = TokenSettings.of_flags(vars(args), TokenSettings.of_flags(trained))
        start = TokenSettings() if as_evit else None
        if args.model in VARIANTS:
            start = TokenSettings(VARIANTS[args.model].keep_rate)
        settings = TokenSettings.of_flags(vars(args), TokenSettings.of_flags(trained, start))
    except ValueError as error:
        parser.error(str(error))
    if settings:
        vars(args).update(settings.flags())
    return bool(asked or args.model in VARIANTS)


def flag_of(name):
    """The flag that sets an attribute of the Namespace."""
    return f'--{name.replace("_", "-")}'
