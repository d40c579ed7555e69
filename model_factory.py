"""Models by name: timm's, as they are or turned into an EViT."""
import timm
from timm.layers import to_2tuple

from distributed import log
from models_evit import to_evit
from utils import InputError, one_line

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
