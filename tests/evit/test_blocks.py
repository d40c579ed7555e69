"""The MLP of an EViT: GELU in place, unless a gradient or a hook needs its input."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from models_evit import from_evit


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model('deit_tiny_patch16_shrink_base', img_size=64, depth=4, **options).eval()


def outputs_of_fc1(mlp, x):
    """What `fc1` returned, kept as a hook would keep it."""
    outputs, forward = [], mlp.fc1.forward
    mlp.fc1.forward = lambda x: outputs.append(forward(x)) or outputs[-1]
    mlp(x)
    del mlp.fc1.forward
    return outputs[0]


def test_inplace_gelu():
    """In place where nothing needs its input: no gradient and no hook."""
    mlp, x = tiny().blocks[0].mlp, torch.randn(2, 5, 192)
    assert torch.equal(outputs_of_fc1(mlp, x), mlp.fc1(x))
    with torch.no_grad():
        assert torch.equal(outputs_of_fc1(mlp, x), F.gelu(mlp.fc1(x)))
    assert isinstance(tiny(act_layer=torch.nn.ReLU).blocks[0].mlp.act, torch.nn.ReLU)


@pytest.mark.parametrize('kind', ['fc1', 'act', 'input of act', 'any module', 'input of any module'])
def test_hooks_see_the_hidden_layer(kind):
    """Also after the pass, on an EViT and on timm's model with the same weights."""
    model, images, captured = tiny(fuse_token=True).eval(), torch.randn(2, 3, 64, 64), []
    mlp = model.blocks[0].mlp
    register = {'fc1': mlp.fc1.register_forward_hook, 'act': mlp.act.register_forward_hook,
                'input of act': mlp.act.register_forward_pre_hook, 'any module': register_module_forward_hook,
                'input of any module': register_module_forward_pre_hook}[kind]

    def capture(module, inputs, output=None):
        if module is (mlp.fc1 if kind in ('fc1', 'any module') else mlp.act):
            captured.append(output if kind in ('fc1', 'any module') else inputs[0])

    with torch.no_grad():
        plain = model(images, keep_rate=1)
        hook = register(capture)
        try:
            assert torch.equal(model(images, keep_rate=1), plain)
        finally:
            hook.remove()
        from_evit(model)
        expected, = outputs_of_fc1_in(model, images)
    assert len(captured) == 1 and torch.equal(captured[0], expected)


def outputs_of_fc1_in(model, images):
    outputs = []
    hook = model.blocks[0].mlp.fc1.register_forward_hook(lambda *call: outputs.append(call[2].clone()))
    model(images)
    hook.remove()
    return outputs
