"""Any model of timm as an EViT, against timm and against a naive definition of the method."""
import copy
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

from conftest import ROOT
from evit.settings import TokenSettings
from evit_definition import definition
from models_evit import EViT, from_evit, obstacle, to_evit

# Two heads of 16 channels, 3 blocks, 16 patches
SMALL = dict(embed_dim=32, num_heads=2, depth=3, img_size=32, patch_size=8, num_classes=5)
KINDS = {
    'class token': ('vit_tiny_patch16_224', dict(qk_norm=True)),
    'registers': ('vit_small_patch14_reg4_dinov2', {}),
    'registers without LayerScale': ('vit_so400m_patch16_radio_v4', {}),
    'clip': ('vit_base_patch16_clip_quickgelu_224', {}),
    'swiglu': ('vit_giant_patch14_dinov2', {}),
    'average': ('beit3_base_patch16_224', {}),
    'distilled': ('deit_tiny_distilled_patch16_224', {}),
    'deit3': ('deit3_small_patch16_224', {}),
    'average with registers': ('vit_small_patch14_reg4_dinov2', dict(global_pool='avg', pool_include_prefix=True)),
    'non-square': ('vit_tiny_patch16_224', dict(img_size=(32, 24), patch_size=(4, 8), global_pool='avg')),
    'hybrid': ('vit_tiny_r_s16_p8_224', dict(img_size=(64, 64), patch_size=1)),
    'eva': ('eva_giant_patch14_224', {}),
    'eva02': ('eva02_base_patch14_224', {}),
    'eva02 clip': ('eva02_base_patch16_clip_224', {}),
    'post-norm': ('eva02_enormous_patch14_clip_224', {}),
    'dinov3': ('vit_small_patch16_dinov3', {}),
    'rope': ('vit_small_patch16_rope_ape_224', {}),
    'rope mixed': ('vit_small_patch16_rope_mixed_224', {}),
    'map': ('vit_pe_core_tiny_patch16_384', dict(attn_pool_num_heads=2)),
    'lvvit': ('lvvit_s', {}),
    'without class token': ('vit_base_patch16_siglip_gap_224', {}),
    'map without class token': ('vit_base_patch16_siglip_224', dict(global_pool='map')),
    'registers alone': ('vit_medium_patch16_reg4_gap_256', {}),
    'eva without class token': ('vit_small_patch16_rope_224', dict(class_token=False, global_pool='avg')),
    'grouped queries': ('vit_base_patch16_sapiens2', dict(num_heads=4, num_kv_heads=2)),
}
KINDS = {kind: (name, options) for kind, (name, options) in KINDS.items() if timm.is_model(name)}
CLASSLESS = ({'without class token', 'map without class token', 'registers alone', 'eva without class token'}
             & KINDS.keys())
kinds = pytest.mark.parametrize('kind', KINDS)


def build(kind):
    """timm's model, with weights large enough for every part to matter, and images."""
    name, options = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL | options).eval()
    if name == 'lvvit_s':
        from_evit(model)
    for key, parameter in model.named_parameters():
        parameter.data = ('norm' in key and key.endswith('weight')) + torch.randn_like(parameter) * 0.2
    size = options.get('img_size', (32, 32))
    return model, torch.randn(3, 3, *size)


# --- Against the definition -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind, way', [(kind, way) for kind in KINDS for way in ('drop', 'fuse', 'merge')
                                       if way == 'merge' or kind not in CLASSLESS])
def test_model_against_the_definition(kind, way):
    """Logits, kept tokens, maps and gradients, in float64."""
    model, images = build(kind)
    model, images = model.double(), images.double().requires_grad_()
    if getattr(model, 'rope_mixed', False):
        model.rope.t_x, model.rope.t_y = model.rope.t_x.float(), model.rope.t_y.float()    # timm 1.0.24 needs that
    twin, norm = to_evit(copy.deepcopy(model), 0.7, (0, 2), way == 'fuse', way == 'merge'), way == 'fuse'
    expected, expected_maps, expected_kept = definition(model, images, 0.7, (0, 2), way, norm)
    logits, kept = twin(images, get_idx=True)
    torch.testing.assert_close(logits, expected)
    assert trace(kept, len(expected_maps[0][0, 0].flatten())) == expected_kept
    coefficients = torch.randn_like(logits)
    inputs = [images, *model.parameters()], [images, *twin.parameters()]
    gradients = [torch.autograd.grad((output * coefficients).sum(), tensors, allow_unused=True)
                 for output, tensors in zip((expected, logits), inputs)]
    for (name, _), one, other in zip([('images', None), *model.named_parameters()], *gradients, strict=True):
        torch.testing.assert_close(other, one, msg=lambda text: f'{name}: {text}')
    with torch.no_grad():
        maps = twin.forward_intermediates(images, norm=norm, intermediates_only=True)
    for block_map, expected_map in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(block_map, expected_map.detach())


def trace(kept, num_patches):
    """The patches that the last block kept, a set for each image, from the positions."""
    alive = [list(range(num_patches)) for _ in kept[0]]
    for idx in kept:
        alive = [[tokens[i] for i in row] + [None] for tokens, row in zip(alive, idx.tolist())]
    return [set(tokens) - {None} for tokens in alive]


# --- Against timm ---------------------------------------------------------------------------------------------------

@kinds
def test_rate_1_and_back(kind):
    """Bit for bit timm's model, its map included; so is the model that `from_evit` gives back.

    The logits are to rounding, where the last block computes what the head reads; bit for bit if that block is hooked.
    """
    model, images = build(kind)
    evit, way = copy.deepcopy(model), dict(merge_token=True) if kind in CLASSLESS else dict(fuse_token=True)
    assert to_evit(evit, 0.7, **way) is evit
    assert evit.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in evit.state_dict().items())
    assert evit.no_weight_decay() == model.no_weight_decay() and evit.pretrained_cfg == model.pretrained_cfg
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(evit(images, keep_rate=1), expected)
        hook = evit.blocks[-1].mlp.register_forward_hook(lambda *_: None)
        assert torch.equal(evit(images, keep_rate=1), expected)
        assert not torch.allclose(evit(images), expected, atol=1e-3)
        to_evit(evit, 1)
        assert torch.equal(evit.forward_features(images), model.forward_features(images))
        options = dict(norm=True, return_prefix_tokens=model.num_prefix_tokens > 0)
        for ours, theirs in zip(evit.forward_intermediates(images, **options)[1],
                                model.forward_intermediates(images, **options)[1], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert torch.equal(to_evit(evit, 0.7, merge_token=True)(images, keep_rate=1), expected)
        hook.remove()
        to_evit(evit, 0.5, (0,))
        num_patches = model.patch_embed.num_patches
        for twin in (copy.deepcopy(evit), pickle.loads(pickle.dumps(evit))):
            assert torch.equal(twin(images), evit(images)) and twin.kept_counts() == (num_patches // 2, None, None)
        assert from_evit(evit) is evit and torch.equal(evit(images), expected)
    pairs = zip(evit.named_modules(), model.named_modules(), strict=True)
    assert all(type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys()
               for (_, ours), (_, theirs) in pairs)


@pytest.mark.parametrize('kind, merge', [*((kind, kind in CLASSLESS) for kind in KINDS), ('average', True),
                                         ('rope mixed', True)])
@pytest.mark.parametrize('compiled_graphs', ['captured'], indirect=True)
def test_one_graph(kind, merge, compiled_graphs):
    model, images = build(kind)
    model = to_evit(model, 0.7, (0, 2), fuse_token=not merge, merge_token=merge)
    with torch.no_grad():
        logits, kept = torch.compile(model, fullgraph=True)(images, get_idx=True)
        expected, expected_kept = model(images, get_idx=True)
    torch.testing.assert_close(logits, expected)
    assert all(torch.equal(one, other) for one, other in zip(kept, expected_kept, strict=True))
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize('kind, merge', [*((kind, kind in CLASSLESS) for kind in KINDS), ('average', True),
                                         ('rope mixed', True)])
def test_training_step_with_gradient_checkpointing(kind, merge):
    """The same weights after the step as without, and a lower loss."""
    weights = []
    for enable in (False, True):
        model, images = build(kind)
        model = to_evit(model, 0.7, (0, 2), fuse_token=not merge, merge_token=merge).train()
        model.set_grad_checkpointing(enable)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loss = F.cross_entropy(model(images), torch.arange(3))
        loss.backward()
        optimizer.step()
        weights.append(model.state_dict())
        assert F.cross_entropy(model(images), torch.arange(3)) < loss
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value)


@kinds
def test_last_block_in_training(kind):
    """It computes what the head reads. Logits and gradients are those of the whole block, which a hook brings back."""
    model, images = build(kind)
    way = 'merge' if kind in CLASSLESS else 'fuse'
    model, images = to_evit(model.double(), 0.7, (0, 1), way=way).train(), images.double()
    block, lengths, results = model.blocks[-1], [], []
    if getattr(model, 'rope_mixed', False):
        model.rope.t_x, model.rope.t_y = model.rope.t_x.float(), model.rope.t_y.float()    # timm 1.0.24 needs that
    block.feed_forward = lambda x: lengths.append(x.shape[1]) or type(block).feed_forward(block, x)
    for _ in range(2):
        torch.manual_seed(0)
        logits = model(images)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), model.parameters(), allow_unused=True)))
        block.register_forward_hook(lambda *_: None)
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)
    assert lengths == ([model.num_prefix_tokens] if model.global_pool == 'token' and kind != 'lvvit' else [])


@pytest.mark.parametrize('register', ['register_forward_hook', 'register_full_backward_hook'])
def test_hook_on_the_norm(register):
    """It sees all tokens."""
    model, images = build('class token')
    lengths = []
    model = to_evit(model, 0.5, (0,))
    getattr(model.norm, register)(lambda module, before, after: lengths.append(after[0].shape[-2]))
    model(images).sum().backward()
    assert lengths == [1 + 8]


@pytest.mark.parametrize('way', ['fuse', 'merge'])
def test_compiled_at_another_rate(way):
    model, images = build('class token')
    compiled = torch.compile(to_evit(model, 0.7, way=way), backend='aot_eager')
    for rate in 0.7, 0.5, 0.3:
        to_evit(model, rate)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images))


def test_merging_exports_without_a_scatter_with_reduction():
    model, images = build('eva02')
    model = to_evit(model, 0.7, (0, 2), merge_token=True)
    graph = torch.export.export(model, (images,)).run_decompositions()
    operations = ' '.join(str(node.target) for node in graph.graph.nodes)
    assert 'sort' in operations and not re.search('scatter|index_add|index_put', operations)
    torch.testing.assert_close(graph.module()(images), model(images))


@pytest.mark.parametrize('kind', ['registers', 'eva02', 'rope mixed'])
def test_export_with_any_batch_size(kind):
    model, images = build(kind)
    model = to_evit(model, 0.7, (0, 2), fuse_token=True)
    graph = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch', min=2)},)).module()
    for batch in (images, torch.cat([images, images + 1])):
        torch.testing.assert_close(graph(batch), model(batch))


@kinds
def test_classifier_and_input_size(kind):
    model, _ = build(kind)
    model = to_evit(model, 0.7, (0, 2), merge_token=kind in CLASSLESS)
    model.reset_classifier(7)
    model.set_input_size((48, 32))
    assert model(torch.zeros(2, 3, 48, 32)).shape == (2, 7)
    assert model.kept_counts()[1] is None and len(model(torch.zeros(2, 3, 48, 32), get_idx=True)[1]) == 2


# --- Position embeddings --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, antialias', [
    ('vit_tiny_patch16_224', True), ('vit_small_patch14_reg4_dinov2', True), ('deit3_small_patch16_224', False),
    ('deit_tiny_distilled_patch16_224', False), ('deit_tiny_patch16_shrink_base', False)])
def test_position_embedding_of_another_size(name, antialias):
    """`set_input_size` and `dynamic_img_size` agree, and resize as the family does, smaller and larger."""
    torch.manual_seed(0)
    dynamic = to_evit(timm.create_model(name, dynamic_img_size=True, **SMALL)).eval()
    dynamic.load_state_dict({key: torch.randn_like(value) * 0.2 for key, value in dynamic.state_dict().items()})
    for size in ((16, 24), (48, 40), (32, 32)):
        model, images = copy.deepcopy(dynamic), torch.randn(2, 3, *size)
        model.set_input_size(size)
        num_prefix = model.pos_embed.shape[1] - model.patch_embed.num_patches
        prefix, grid = dynamic.pos_embed.tensor_split([num_prefix], dim=1)
        grid = grid.transpose(1, 2).unflatten(2, (4, 4))
        resized = F.interpolate(grid, (size[0] // 8, size[1] // 8), mode='bicubic', antialias=antialias)
        torch.testing.assert_close(model.pos_embed, torch.cat([prefix, resized.flatten(2).transpose(1, 2)], dim=1))
        with torch.no_grad():
            torch.testing.assert_close(dynamic(images), model(images))
            fixed = from_evit(to_evit(timm.create_model(name, **SMALL | dict(img_size=size)))).eval()
            fixed.load_state_dict(model.state_dict())
            torch.testing.assert_close(dynamic(images, keep_rate=1), fixed(images))


# --- Which models are served ----------------------------------------------------------------------------------------

MODULES = ['vision_transformer', 'vision_transformer_hybrid', 'deit', 'eva', 'beit', 'vision_transformer_sam',
           'vision_transformer_relpos', 'naflexvit']
CLASSLESS_NAMES = '_gap_|siglip|aimv2|test_vit[23]|pe_(core|lang|spatial)_gigantic'
REFUSED = {                                            # the reason, and the names that it concerns
    'ResPostBlock': '^vit_.*patch16_rpn_',
    'Diff|Parallel': '^vit_(dlittle|dpwee|dwee|pwee)_',
    'relative position bias': '^beit(v2)?_|relpos|^samvit',
    'several sizes': '^naflexvit'}


def test_pretrained_models_of_timm():
    """Each is built with one block on the meta device."""
    tags = Counter(tag.partition('.')[0] for tag in timm.list_pretrained())
    served = 0
    for name in tags:
        if not is_model_in_modules(name, MODULES):
            continue
        blocks = {} if 'sapiens2' in name else {'depth': 1}        # Sapiens2 has a list with a value for each block
        with torch.device('meta'):
            model = timm.create_model(name, **blocks)
        expected = [reason for reason, names in REFUSED.items() if re.search(names, name)]
        if not expected:
            classless = bool(re.search(CLASSLESS_NAMES, name))
            if classless:
                with pytest.raises(ValueError, match='no class token'):
                    to_evit(model)
            assert type(to_evit(model, merge_token=classless)).__name__.startswith('EViT'), name
            served += tags[name]
        else:
            with pytest.raises(ValueError, match=expected[-1]):
                to_evit(model)
    if timm.__version__ == '1.0.31':
        table = (ROOT / 'README.md').read_text().partition('423 pretrained tags')[2].partition('\n\n')[0]
        assert served == 423 == sum(int(tags) for tags in re.findall(r'\| (\d+) \|', table))


@pytest.mark.parametrize('model, reason', [
    (dict(attn_layer='diff'), 'DiffAttention'), (dict(block_fn=ParallelScalingBlock), 'ParallelScalingBlock'),
    ('resnet18', 'no VisionTransformer or Eva'),
    ('xcit_nano_12_p16_224', 'no VisionTransformer or Eva')], ids=str)
def test_refused(model, reason):
    with torch.device('meta'):
        model = (timm.create_model(model) if isinstance(model, str) else
                 VisionTransformer(embed_dim=32, num_heads=2, depth=2, **model))
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f'cannot become an EViT: .*{reason}') as error:
        to_evit(model)
    assert '\n' not in str(error.value) and [type(module) for module in model.modules()] == classes


def test_gated_attention_refused():
    with torch.device('meta'):
        model = Eva(embed_dim=32, num_heads=2, depth=2)
    model.blocks[1].attn.gate = torch.nn.Linear(32, 32, device='meta')
    assert obstacle(model) == 'its attention is gated'


@pytest.mark.parametrize('depth, drop_loc', [(12, (3, 6, 9)), (16, (4, 8, 12)), (24, (6, 12, 18)), (3, (0, 1, 2)),
                                             (1, (0,))])
def test_blocks_by_default(depth, drop_loc):
    assert to_evit(VisionTransformer(embed_dim=12, num_heads=2, depth=depth)).token_settings.blocks(depth) == drop_loc


@pytest.mark.parametrize('way', ['drop', 'fuse', 'merge'])
def test_uniform_schedule(way):
    """In every block, with as many tokens over all blocks, up to rounding; equal to a list of rates."""
    model = VisionTransformer(img_size=64, patch_size=4, embed_dim=12, num_heads=2, depth=8).eval()
    model, images = to_evit(model, 0.7, None, way == 'fuse', way == 'merge', uniform=True), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, kept = model(images, get_idx=True)
        rate = model.block_keep_rates(0.7)[0]
        assert len(kept) == 8 and torch.equal(model(images, keep_rate=8 * [rate]), logits)
    uniform = sum(model.kept_counts())
    stages = sum([256, 256, 180, 180, 126, 126, 89, 89])                # ceil(0.7 · 256), and so on
    assert uniform == pytest.approx(stages, rel=0.03 if way == 'fuse' else 0.01)
    assert model.kept_counts(1) == 8 * (None,)


@pytest.mark.parametrize('way', ['drop', 'fuse', 'merge'])
def test_token_counts(way):
    """So many tokens leave each block: those of the calls with `tokens`, where a fused one is one of them."""
    model = timm.create_model('vit_small_patch14_reg4_dinov2', **SMALL | dict(depth=6, img_size=56)).eval()     # 49 + 5
    counts, fused = (60, 54, 53, 40, 40, 8), int(way == 'fuse')
    to_evit(model, fuse_token=way == 'fuse', merge_token=way == 'merge', token_counts=counts)
    images, left = torch.randn(2, 3, 56, 56), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: left.append(output[0].shape[1]))
    with torch.no_grad():
        logits, kept = model(images, get_idx=True)
        assert left == [54, 54, 53, 40, 40, 8]
        k = None, None, 48 - fused, 35 - fused, None, 3 - fused
        assert [idx.shape[1] for idx in kept] == [count for count in k if count] and model.kept_counts() == k
        assert torch.equal(model(images, kept_counts=k), logits)
        del left[:]
        model(images, keep_rate=1)                     # the rate of one call has the last word, as ever
        assert left == 6 * [54]
    for counts, message in (((54,) * 5, 'each of 6 blocks, not 5'), ((54,) * 5 + (5 + fused,), 'too few')):
        with pytest.raises(ValueError, match=f'token_counts.*{message}'):
            to_evit(model, fuse_token=way == 'fuse', token_counts=counts)
    assert model.kept_counts() == k


def test_from_evit_of_another_model():
    for model in (torch.nn.Linear(1, 1), VisionTransformer(embed_dim=12, num_heads=2, depth=1)):
        with pytest.raises(ValueError, match='is no EViT'):
            from_evit(model)


def test_token_counts_of_a_new_model():
    built = EViT(token_counts=(17, 9), img_size=32, patch_size=8, embed_dim=12, num_heads=2, depth=2)
    assert built.kept_counts() == (None, 8) and built.token_settings.token_counts == (17, 9)
    built.set_input_size((64, 64))                     # of 64 patches, half
    assert built.kept_counts() == (None, 32)


def test_settings_of_an_evit():
    model = to_evit(VisionTransformer(embed_dim=12, num_heads=2, depth=4), 0.7, (1,), fuse_token=True)
    for arguments in ((0,), (1.1,), (0.5, (4,)), (0.5, (-1,)), (0.5, (1,), True, True)):
        with pytest.raises(ValueError, match='keep rate|drop_loc|either fused .* or merged'):
            to_evit(model, *arguments)
        assert type(model) is EViT and model.token_settings == TokenSettings(0.7, (1,), 'fuse')
        assert model.kept_counts() == (None, 138, None, None)
    # Settings that are not named stay; the fused token counts
    assert to_evit(model, np.float64(0.5), iter([2, 3])).kept_counts() == (None, None, 98, 50)
    assert to_evit(model, fuse_token=False, merge_token=True).token_settings == TokenSettings(0.5, (2, 3), 'merge')
    assert to_evit(model, merge_token=False, fuse_token=True).token_settings == TokenSettings(0.5, (2, 3), 'fuse')
    assert to_evit(model, fuse_token=False).token_settings == TokenSettings(0.5, (2, 3), 'drop')
    counts = 197, 197, 99, 99
    assert to_evit(model, token_counts=counts, way='merge').token_settings == TokenSettings(0.5, (2, 3), 'merge',
                                                                                           token_counts=counts)
    assert model.kept_counts() == (None, None, 98, None)
    assert to_evit(model, 0.6, drop_loc=[1]).token_settings == TokenSettings(0.6, (1,), 'merge')
    with pytest.raises(ValueError, match="there is no way 'burn', but drop, fuse, merge"):
        to_evit(model, way='burn')
