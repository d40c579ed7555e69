"""Models by name: timm's, as they are or turned into an EViT, and the flags that name them."""
import argparse

import timm
from timm.layers import to_2tuple

from runtime.arguments import block_numbers, key_value, positive, rate, timm_model, token_counts
from runtime.distributed import log
from models_evit import VARIANTS, to_evit
from runtime.preprocessing import Preprocessing, pretrained_input
from runtime.utils import InputError, one_line

SCHEDULE_DEFAULTS = {'base_keep_rate': 0.7, 'drop_loc': None, 'keep_schedule': 'stages'}      # or --token-counts
TOKEN_DEFAULTS = SCHEDULE_DEFAULTS | {'fuse_token': False, 'merge_token': False, 'token_counts': None}

# Arguments of timm's models that follow from flags or from the data
RESERVED = {'num_classes', 'drop_rate', 'drop_path_rate', 'img_size', 'in_chans', 'pretrained', 'checkpoint_path',
            'pretrained_cfg', 'pretrained_cfg_overlay', 'base_keep_rate', 'drop_loc', 'fuse_token',
            'merge_token', 'uniform', 'token_counts'}


def create_model(name, *, pretrained=False, new_head=True, input_size=None, tokens=None, grad_checkpointing=False,
                 model_kwargs=None, **options):
    """A model of timm on the CPU.

    Args:
        name: timm's, or one of models_evit.py.
        pretrained: whether to load timm's weights.
        new_head: whether the head may be new where the weights know other classes.
        input_size: side of the images in pixels; None for the model's own. Only some models need to know it.
        tokens: None for the model as it is, or the arguments of `to_evit`.
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
            to_evit(model, **tokens)
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
    while True:
        try:
            return timm.create_model(name, pretrained=pretrained, **options, **model_kwargs)
        except Exception as error:
            given = f' with --model-kwargs {model_kwargs}' if model_kwargs else ''
            if "'drop_path_rate'" in str(error) and options.get('drop_path_rate') is not None:
                log(f'note: {name} takes no --drop-path')
                options = options | {'drop_path_rate': None}
            elif pretrained:
                raise InputError(f'--pretrained: the weights of {name}{given} cannot be loaded: {one_line(error)}'
                                 ) from None
            elif model_kwargs or isinstance(error, (ValueError, AssertionError)):
                raise InputError(f'--model {name}{given}: {one_line(error)}') from None
            else:
                raise


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
    add('--base-keep-rate', type=rate, help='fraction of tokens that a reorganising block keeps (default: of the '
        'model, or 0.7)')
    add('--fuse-token', action=on_off, help='fuse the other tokens into one instead of dropping them (default: off)')
    add('--merge-token', action=on_off, help='merge each of them into the most similar kept token (default: off)')
    add('--drop-loc', type=block_numbers, help='numbers of the blocks that reorganise tokens, from 0 (default: '
        'depth/4, depth/2, 3·depth/4)')
    add('--keep-schedule', choices=['stages', 'uniform'], help='in these blocks (default), or spread over all blocks')
    add('--token-counts', type=token_counts, metavar='N,N,…|FILE.json', help='instead of rate and blocks: how many '
        'tokens leave each block, the class token included')
    model = parser.add_argument_group('model')
    add = model.add_argument
    add('--model', type=timm_model, default='deit_small_patch16_shrink_base',
        help='a model of models_evit.py or any timm model')
    add('--pretrained', action='store_true', help="take images as timm's weights of the model do, and start from these "
        'weights unless others are named')
    add('--model-kwargs', nargs='+', default=[], action='extend', type=key_value, metavar='KEY=VALUE',
        help='more arguments of the model that have no flag, such as patch_size=8 embed_dim=96')
    add('--input-size', type=positive(int), help="pixels (default: 224, with --pretrained the weights')")
    return tokens, model


def fill_model_arguments(args, parser, defaults=TOKEN_DEFAULTS, without=(), as_evit=False):
    """Complete the flags of `add_model_arguments`; → whether they ask for an EViT.

    Args:
        args: the Namespace.
        parser: for errors.
        defaults: of the flags that make an EViT.
        without: names of flags that do not go with --token-counts.
        as_evit: whether the model becomes an EViT without such a flag, too.
    """
    args.model_kwargs = dict(args.model_kwargs)
    given = [name for name in defaults if getattr(args, name) is not None]
    clash = [name for name in (*SCHEDULE_DEFAULTS, *without) if getattr(args, name) is not None]
    if args.token_counts and clash:
        parser.error(f'--token-counts takes no --{clash[0].replace("_", "-")}')
    is_evit = args.model in VARIANTS or bool(given)
    filled = dict(defaults) if is_evit or as_evit else {}
    if args.model in VARIANTS:
        filled |= {'base_keep_rate': VARIANTS[args.model].keep_rate, 'drop_loc': VARIANTS[args.model].drop_loc}
    for name, default in (filled | {'input_size': input_of(args)[0]}).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return is_evit


def input_of(args):
    """The side of the images in pixels and their `Preprocessing`: those of timm's weights, LV-ViT's, or DeiT's."""
    if args.pretrained or is_lvvit(args.model):
        return pretrained_input(args.model)
    return 224, Preprocessing()


def is_lvvit(name):
    """Whether a model has an auxiliary classifier of the patch tokens."""
    return name in VARIANTS and VARIANTS[name].is_lvvit


def token_settings(args):
    """The arguments of `to_evit`; None if the model is no EViT."""
    if args.base_keep_rate is None:
        return None
    names = 'base_keep_rate', 'drop_loc', 'fuse_token', 'merge_token', 'token_counts'
    return {name: getattr(args, name) for name in names} | {'uniform': args.keep_schedule == 'uniform'}
