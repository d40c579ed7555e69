import math
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import aot_module_simplified, make_boxed_func, min_cut_rematerialization_partition

from conftest import reference, reference_images, reference_weights
from datasets import Digits
from engine import keep_rate_at
from evit.plain import PlainEViT
from evit.settings import TokenSettings
from models_evit import VARIANTS, class_attention, num_kept, reorganize_tokens, resize_pos_embed
from runtime.compiled_model import CompiledModel


def tiny(**kwargs):
    torch.manual_seed(0)
    kwargs = dict(img_size=64, num_classes=10, base_keep_rate=0.7) | kwargs
    return timm.create_model('deit_tiny_patch16_shrink_base', **kwargs).eval()


def kept_patches(kept, num_patches, fused):
    """Trace the positions of each stage back to image patches, in a plain loop. -1 stands for a fused token."""
    alive = [list(range(num_patches)) for _ in kept[0]]
    stages = []
    for idx in kept:
        alive = [[tokens[i] for i in row.tolist()] for tokens, row in zip(alive, idx)]
        stages.append([sorted(tokens) for tokens in alive])
        alive = [tokens + [-1] * fused for tokens in alive]
    return stages


# --- Reference values of the original code --------------------------------------------------------------------------

def reference_model(case, **kwargs):
    model = timm.create_model(
        f'deit_{case["size"]}_patch16_shrink_base', base_keep_rate=case['base_keep_rate'], drop_loc=case['drop_loc'],
        fuse_token=case['fuse_token'], num_classes=case['num_classes'], **kwargs)
    model.load_state_dict(reference_weights(model))
    return model


@pytest.mark.parametrize('case', reference('forward.json'), ids=lambda case: '-'.join(
    str(case[key]) for key in ('size', 'base_keep_rate', 'fuse_token', 'input_size', 'call_keep_rate')))
def test_forward_of_the_original(case):
    model = reference_model(case, img_size=case['model_img_size']).eval()
    if case['input_size'] != case['model_img_size']:
        model.set_input_size((case['input_size'], case['input_size']))
    tokens_after_block = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: tokens_after_block.append(output[0].shape[1] - 1))
    with torch.no_grad():
        logits, kept = model(reference_images(0, 2, case['input_size']), case['call_keep_rate'], get_idx=True)
    assert tokens_after_block == case['tokens_after_block']
    np.testing.assert_allclose(logits.norm(dim=1), case['logits_norm'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits[:, :8], case['logits_first8'], rtol=0, atol=1e-4)
    assert logits.argmax(dim=1).tolist() == case['argmax']
    if case['kept_patches']:
        assert kept_patches(kept, (case['input_size'] // 16) ** 2, case['fuse_token']) == case['kept_patches']
    else:
        assert kept == []


def test_position_embedding_resized_at_load():
    case = next(case for case in reference('forward.json') if case['input_size'] != case['model_img_size'])
    weights = reference_weights(timm.create_model('deit_tiny_patch16_shrink_base'))
    model = timm.create_model('deit_tiny_patch16_shrink_base', fuse_token=True, img_size=case['input_size']).eval()
    weights['pos_embed'] = resize_pos_embed(weights['pos_embed'], model)
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(reference_images(0, 2, case['input_size']))
    np.testing.assert_allclose(logits.norm(dim=1), case['logits_norm'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('case', reference('training.json')['train'], ids=['fused', 'dropped'])
def test_training_of_the_original(case):
    model = reference_model(case).double().train()
    images = reference_images(case['input_seed'], case['batch'], 224).double()
    labels = torch.arange(case['batch']) % case['num_classes']
    optimizer = torch.optim.SGD(model.parameters(), lr=case['lr'])
    for expected_loss, expected_norms in zip(case['losses'], case['grad_norms'], strict=True):
        loss = F.cross_entropy(model(images, case['call_keep_rate']), labels)
        assert loss.item() == pytest.approx(expected_loss, abs=1e-7)
        optimizer.zero_grad()
        loss.backward()
        for name, norm in expected_norms.items():
            assert model.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-7), name
        optimizer.step()


# --- Token operations against a plain loop --------------------------------------------------------------------------

@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('shape, k', [((1, 2, 1), 1), ((3, 17, 5), 12), ((2, 9, 4), 8), ((4, 30, 7), 1)])
def test_reorganize_tokens_against_a_naive_loop(shape, k, fuse):
    generator = torch.Generator().manual_seed(k)
    tokens = torch.randn(shape, generator=generator, dtype=torch.float64)
    scores = torch.rand(shape[:2], generator=generator, dtype=torch.float64)
    result, idx = reorganize_tokens(tokens, scores, k, fuse)
    assert result.shape == (shape[0], k + fuse, shape[2]) and idx.shape == (shape[0], k)
    for b in range(shape[0]):
        best = sorted(range(shape[1]), key=lambda i: -scores[b, i])[:k]
        assert sorted(idx[b].tolist()) == sorted(best)
        for place, i in enumerate(idx[b].tolist()):
            assert torch.equal(result[b, place], tokens[b, i])
        if fuse:
            fused = sum(scores[b, i] * tokens[b, i] for i in range(shape[1]) if i not in best)
            torch.testing.assert_close(result[b, k], fused)


def test_gradients_of_reorganize_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(2, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, s: reorganize_tokens(t, s, 4, fuse=True)[0], (tokens, scores))
    reorganize_tokens(tokens, scores, 4, fuse=True)[0].sum().backward()
    assert (scores.grad != 0).sum(dim=1).tolist() == [2, 2]            # only the scores of fused tokens


def test_class_attention_against_the_full_matrix():
    q, k = torch.randn(2, 2, 3, 11, 8, dtype=torch.float64)
    full = (q @ k.transpose(-2, -1) / math.sqrt(8)).softmax(dim=-1)
    torch.testing.assert_close(class_attention(q, k, 8 ** -0.5), full.mean(dim=1)[:, 0])
    with torch.autocast('cpu', torch.bfloat16):
        scores = class_attention(q.bfloat16(), k.bfloat16(), 8 ** -0.5)
    assert scores.dtype == torch.float32                               # scores decide which tokens are kept


@pytest.mark.parametrize('num_tokens, keep_rate, expected', [
    (196, 0.7, 138), (139, 0.7, 98), (196, 1., 196), (196, 1.5, 196), (196, 0.001, 1), (1, 0.5, 1), (10, 0.5, 5)])
def test_num_kept(num_tokens, keep_rate, expected):
    assert num_kept(num_tokens, keep_rate) == expected


@pytest.mark.parametrize('num_prefix_tokens', [1, 2, 3])
@pytest.mark.parametrize('fuse', [False, True])
def test_protected_tokens(num_prefix_tokens, fuse):
    block = tiny(embed_dim=12).blocks[0]
    block.keep_rate, block.num_prefix_tokens = 0.5, num_prefix_tokens
    block.token_settings = TokenSettings(way='fuse' if fuse else 'drop')
    for layer in (block.attn.proj, block.mlp.fc2):                     # both branches add zero: tokens are unchanged
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x = torch.randn(2, num_prefix_tokens + 9, 12)
    y, (idx, *_) = block(x, get_idx=True)
    assert y.shape == (2, num_prefix_tokens + 5 + fuse, 12)
    assert torch.equal(y[:, :num_prefix_tokens], x[:, :num_prefix_tokens])
    assert 0 <= idx.min() and idx.max() < 9
    for b in range(2):
        assert torch.equal(y[b, num_prefix_tokens:num_prefix_tokens + 5], x[b, num_prefix_tokens + idx[b]])


# --- Keep rates of a call -------------------------------------------------------------------------------------------

def counts(model, **kwargs):
    return [idx.shape[1] for idx in model(torch.zeros(1, 3, 64, 64), get_idx=True, **kwargs)[1]]


def test_keep_rate_of_a_call():
    model = tiny()                                                     # 16 patches, blocks 3, 6, 9
    assert counts(model) == [12, 9, 7]
    assert counts(model, keep_rate=0.5) == [8, 4, 2]
    assert counts(model, keep_rate=1) == counts(model, keep_rate=2.) == counts(model, keep_rate=math.inf) == []
    assert counts(model, keep_rate=[1] * 11 + [0.25]) == [4]
    assert counts(model, keep_rate=(0.5, 0.5) + (1.,) * 10) == [8, 4]
    assert counts(tiny(fuse_token=True)) == [12, 10, 8]                # a fused token is a candidate of the next stage
    assert counts(tiny(drop_loc=(), base_keep_rate=0.5)) == []


@pytest.mark.parametrize('keep_rate', [0, -0.1, float('nan'), [0.5] * 11, [0.5] * 11 + [0.]])
def test_wrong_keep_rate_of_a_call(keep_rate):
    with pytest.raises(ValueError, match='keep_rate'):
        tiny()(torch.zeros(1, 3, 64, 64), keep_rate=keep_rate)


@pytest.mark.parametrize('kwargs', [
    {'base_keep_rate': 0}, {'base_keep_rate': 1.1}, {'drop_loc': (3, 12)}, {'drop_loc': (-1,)},
    {'class_token': False, 'global_pool': 'avg'}])
def test_wrong_model_arguments(kwargs):
    with pytest.raises(ValueError, match='keep rate|drop_loc|class token'):
        tiny(**kwargs)


# --- Every registered model -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', VARIANTS)
def test_registered_models(name):
    torch.manual_seed(0)
    options = dict(img_size=32, num_classes=5, fuse_token=True, drop_path_rate=0.1)
    model = timm.create_model(name, **options).train()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    twin = timm.create_model(name, **options)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(images), model.eval()(images))
        assert len(model(images, get_idx=True)[1]) == (3 if VARIANTS[name].keep_rate < 1 else 0)


def test_names_rates_and_sizes():
    assert {name: (v.keep_rate, v.img_size) for name, v in VARIANTS.items() if '_224' in name or '2_' in name
            or '288' in name or '304' in name} == {
        'deit_small_patch16_224_shrink_base': (0.7, 224), 'deit_small_patch16_224_shrink': (0.7, 224),
        'deit_small_patch16_224_shrink05': (0.5, 224), 'deit_small_patch16_272_shrink': (0.7, 272),
        'deit_small_patch16_288_shrink06': (0.6, 288), 'deit_small_patch16_304_shrink05': (0.5, 304)}
    sizes = 'tiny', 'small', 'base'
    others = {name for name in VARIANTS if not name.startswith(('deit_small_patch16_2', 'deit_small_patch16_3'))}
    assert others == {f'deit_{size}_{kind}patch16_shrink_base' for size in sizes for kind in ('', 'distilled_')} | {
        f'lvvit_{size}{end}' for size in 'tsm' for end in ('', '_shrink_base')}
    model = timm.create_model('deit_small_patch16_304_shrink05')
    assert model.token_settings.base_keep_rate == 0.5 and model.patch_embed.img_size == (304, 304)
    assert sum(p.numel() for p in model.parameters()) == 22_050_664 + (19 ** 2 - 14 ** 2) * 384
    assert all(timm.models.is_model_in_modules(name, ['models_evit']) for name in VARIANTS)
    assert timm.models.model_entrypoint('deit_small_patch16_224').__module__ == 'timm.models.deit'


# --- Features of timm models ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('distilled', ['', '_distilled'])
def test_rate_1_equals_timm(distilled):
    torch.manual_seed(0)
    deit = timm.create_model(f'deit_tiny{distilled}_patch16_224', num_classes=10).eval()
    model = timm.create_model(f'deit_tiny{distilled}_patch16_shrink_base', num_classes=10).eval()
    model.load_state_dict(deit.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images, keep_rate=1), deit(images))
        assert not torch.allclose(model(images), deit(images), atol=1e-3)
    assert model.no_weight_decay() == deit.no_weight_decay()


@pytest.mark.parametrize('name', ['deit_tiny_patch16_shrink_base', 'deit_tiny_distilled_patch16_shrink_base'])
@pytest.mark.parametrize('options', [{}, {'fuse_token': True}, {'init_values': 0.1, 'qk_norm': True},
                                     {'merge_token': True}])
def test_model_against_the_definition(name, options):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=10, base_keep_rate=0.6, drop_loc=(0, 5, 11),
                              **options).double().eval()
    model.load_state_dict({key: torch.randn_like(value) * 0.1 + (key.endswith('norm.weight'))
                           for key, value in model.state_dict().items()})
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), PlainEViT(model)(images))


def test_gradient_checkpointing():
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = tiny(fuse_token=True)
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_reset_classifier_and_features():
    model = tiny()
    model.reset_classifier(3)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert model.forward_features(torch.zeros(2, 3, 64, 64)).shape == (2, 1 + 7, 192)
    assert model.forward_features(torch.zeros(2, 3, 64, 64), keep_rate=1).shape == (2, 1 + 16, 192)


def test_intermediates_as_tokens():
    model, images = tiny(), torch.zeros(2, 3, 64, 64)
    tokens = model.forward_intermediates(images, indices=[2, 3], output_fmt='NLC', intermediates_only=True)
    assert [x.shape for x in tokens] == [(2, 16, 192), (2, 12, 192)]
    with pytest.raises(ValueError, match='NLC'):
        model.forward_intermediates(images, output_fmt='NHWC')


def test_non_square_images_and_patches():
    model = tiny(img_size=(48, 96), patch_size=8)
    assert counts_of(model, (48, 96)) == [51, 36, 26]


def counts_of(model, size):
    return [idx.shape[1] for idx in model(torch.zeros(1, 3, *size), get_idx=True)[1]]


@pytest.mark.parametrize('options', [{}, {'fuse_token': True}, {'fuse_token': True, 'drop_loc': (0, 1, 2)}])
def test_token_counts(options):
    model, images = tiny(patch_size=8, **options), torch.randn(2, 3, 64, 64)
    for rate in (None, 1, 0.99, 0.983, 0.7, 0.31, [1, .5, .5, *8 * [1.], .3]):
        tokens = model.kept_counts(rate)
        logits, kept = model(images, rate, get_idx=True)
        assert [k for k in tokens if k is not None] == [idx.shape[1] for idx in kept]
        assert torch.equal(model(images, kept_counts=tokens), logits)
    assert model.kept_counts(1) == 12 * (None,)


# --- Compiled -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('keep_rate', [None, 0.5])
def test_one_graph(keep_rate, compiled_graphs):
    model = tiny(fuse_token=True)
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, keep_rate=keep_rate), model(images, keep_rate=keep_rate))
    assert len(compiled_graphs) == 1


def test_graphs_while_the_keep_rate_falls(compiled_graphs):
    """The rate falls at each step. The model and its average are evaluated with two batch sizes."""
    def build():
        return tiny(fuse_token=True, patch_size=8, embed_dim=24, depth=3, drop_loc=(1, 2))

    model, average, images = build(), build(), torch.randn(6, 3, 64, 64)
    compiled, seen = CompiledModel(model, images.device).train(), set()
    for step in range(50):
        rate = keep_rate_at(step, 1, 3, 40, 0.7)
        seen.add(model.kept_counts(rate))
        model.zero_grad()
        logits = compiled(images, keep_rate=rate)
        logits.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        expected = model(images, keep_rate=rate)
        expected.square().sum().backward()
        torch.testing.assert_close(logits, expected)
        for gradient, parameter in zip(gradients, model.parameters()):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
        if step % 10 == 9:
            for evaluated in (model, average):
                evaluated.eval()
                run = CompiledModel(evaluated, images.device)
                with torch.no_grad():
                    for batch in (torch.cat([images, images]), images[:5]):
                        torch.testing.assert_close(run(batch), evaluated(batch))
            model.train()
    # Training: a graph for all tokens, one for the first token counts as constants, one for dynamic token counts and
    # one for the base rate. Evaluation: a graph for each batch size.
    assert len(seen) > 15 and len(compiled_graphs) == 4 + 2


@pytest.mark.parametrize('compiled_graphs', ['captured'], indirect=True)
def test_graphs_of_blocks_that_begin_to_drop_one_after_another(compiled_graphs):
    """Training and evaluation together need more graphs than torch allows by default."""
    model = tiny(patch_size=4, embed_dim=12, depth=7, drop_loc=tuple(range(1, 7)))
    compiled, images = CompiledModel(model, torch.device('cpu')), torch.randn(2, 3, 64, 64)
    starts = [(255 - i) / (256 - i) - 1e-9 for i in range(6)]              # each makes one more block drop tokens
    assert [sum(k is not None for k in model.kept_counts(rate)) for rate in starts] == list(range(1, 7))
    for rate in (1., *starts, 0.9, 0.8, 0.7):
        compiled(images, keep_rate=rate).sum().backward()
    with torch.no_grad():
        for batch in (images, images[:1]):
            compiled(batch)
    assert len(compiled_graphs) > 8


@pytest.mark.gpu
def test_cuda_graphs_of_evaluation(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    model = tiny(fuse_token=True).cuda()
    compiled = CompiledModel(model, torch.device('cuda'))
    with torch.no_grad():
        for batch_size in (4, 3, 4, 3, 4):
            images = torch.randn(batch_size, 3, 64, 64, device='cuda')
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-3, atol=1e-4)


def test_compiled_gradient_checkpointing(compiled_graphs):
    images, gradients = torch.randn(2, 3, 64, 64), []
    for compiled in (False, True):
        model = tiny(fuse_token=True, depth=4, drop_loc=(1, 2))
        model.set_grad_checkpointing()
        run = CompiledModel(model, images.device) if compiled else model
        run(images, keep_rate=0.6).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('way', ['fuse_token', 'merge_token'])
def test_compiled_backward_pass_selects_no_tokens_anew(way):
    """With checkpointing it computes the scores again, maybe with another rounding, but takes the selection over."""
    operations = []

    def backend(graph, inputs):
        def compile_pass(graph, inputs):
            operations.append([str(node.target) for node in graph.graph.nodes])
            return make_boxed_func(graph.forward)

        return aot_module_simplified(graph, inputs, fw_compiler=compile_pass, bw_compiler=compile_pass,
                                     partition_fn=min_cut_rematerialization_partition)

    model = tiny(depth=4, drop_loc=(1, 2), **{way: True})
    model.set_grad_checkpointing()
    torch.compile(model, fullgraph=True, backend=backend)(torch.randn(2, 3, 64, 64)).square().sum().backward()
    selections = [[name for name in names if re.search(r'aten\.(topk|sort|max\.dim)', name)] for names in operations]
    assert len(selections[0]) == (2 if way == 'fuse_token' else 4) and selections[1] == []
    assert 'aten.gelu.default' in operations[1]        # is computed again


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_compiled_eager_and_plain(device, monkeypatch):
    """With the real compiler. The kept patches are compared, too."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    model = timm.create_model('deit_small_patch16_shrink_base', depth=4, drop_loc=(1, 2, 3), fuse_token=True).eval()
    model.load_state_dict(reference_weights(model))
    model, images = model.to(device), reference_images(0, 2, 224).to(device)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad():
        logits, kept = model(images, get_idx=True)
        compiled_logits, compiled_kept = compiled(images, get_idx=True)
        plain_logits = PlainEViT(model)(images)
    torch.testing.assert_close(compiled_logits, logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(plain_logits, logits, rtol=0, atol=1e-4)
    stages = [kept_patches([idx.cpu() for idx in positions], 196, True) for positions in (kept, compiled_kept)]
    assert stages[0] == stages[1] and len(stages[0]) == 3


# --- Precision ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def digits_model():
    """A small EViT trained on the digits, with the validation images and labels."""
    def images_of(digits):
        pixels = torch.from_numpy(np.stack(digits.images)).float().div(127).sub(1)     # (B, 8, 8)
        return pixels.unsqueeze(1).expand(-1, 3, -1, -1), torch.tensor(digits.targets)

    torch.manual_seed(0)
    model = timm.create_model('deit_tiny_patch16_shrink_base', img_size=8, patch_size=2, embed_dim=48, depth=4,
                              drop_loc=(1, 2, 3), num_classes=10, fuse_token=True)
    images, labels = images_of(Digits(True))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=16 * 23)
    for _ in range(16):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule.step()
    return model.eval(), *images_of(Digits(False))


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_bfloat16_on_the_digits(digits_model, device):
    model, images, labels = digits_model
    model, images = model.to(device), images.to(device)
    with torch.no_grad():
        exact = model(images).argmax(dim=1).cpu()
        with torch.autocast(device, torch.bfloat16):
            rounded = model(images).argmax(dim=1).cpu()
    assert (exact == labels).float().mean() > 0.9
    assert (exact == rounded).float().mean() >= 0.99


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_scores_in_float32(device):
    """Neither autocast nor TF32 rounds the scores. They equal float64 scores up to float32 rounding."""
    q, k = torch.randn(2, 4, 3, 197, 64, generator=torch.Generator().manual_seed(0)).to(device)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        with torch.autocast(device, torch.bfloat16):
            scores = class_attention(q, k, 0.125)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, class_attention(q.double(), k.double(), 0.125).float(), rtol=1e-5, atol=1e-7)


def test_flash_attention():
    """Every block uses it, whether or not it reorganises tokens, in training and in evaluation mode."""
    model = tiny(fuse_token=True, depth=4, drop_loc=(1, 2))
    for training in (False, True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.train(training)(torch.zeros(2, 3, 64, 64))
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls['aten::_scaled_dot_product_flash_attention_for_cpu'] == 4
        assert not calls.keys() & {'aten::sort', 'aten::argsort', 'aten::item', 'aten::nonzero'}
