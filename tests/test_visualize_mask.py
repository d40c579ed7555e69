import math

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize

import models_evit  # noqa: F401, registers the models
from visualize_mask import compose_positions, denormalize, kept_patches, mask_images, save_jpeg, save_masked

TINY = 'deit_tiny_patch16_shrink_base'
TINY_DISTILLED = 'deit_tiny_distilled_patch16_shrink_base'
# (name, options, (H, W) of the images, (rows, cols) of the patches)
MODELS = [
    (TINY, dict(img_size=64), (64, 64), (4, 4)),
    (TINY, dict(img_size=(64, 96)), (64, 96), (4, 6)),
    (TINY, dict(img_size=64, patch_size=8), (64, 64), (8, 8)),
    (TINY, dict(img_size=(72, 100)), (72, 100), (4, 6)),
    (TINY, dict(img_size=64, dynamic_img_size=True), (96, 48), (6, 3)),
    (TINY, dict(img_size=64, dynamic_img_size=True, dynamic_img_pad=True), (72, 100), (5, 7)),
    (TINY_DISTILLED, dict(img_size=(96, 64)), (96, 64), (6, 4)),
]


pytestmark = pytest.mark.usefixtures('one_thread')


def create(name=TINY, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **dict(img_size=64, embed_dim=48) | kwargs).eval()


def random_images(size=(64, 64), batch_size=3):
    """Normalised images (B, 3, H, W) whose pixels lie well within black and white."""
    pixels = 0.2 + 0.6 * torch.rand(batch_size, 3, *size, generator=torch.Generator().manual_seed(0))
    return normalize(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def random_kept(batch_size, num_patches, ks, fused, generator):
    """Random positions [(B, k) of each stage], in any order, as a model with or without fused tokens gives them."""
    kept, num_tokens = [], num_patches
    for k in ks:
        kept.append(torch.rand(batch_size, num_tokens, generator=generator).argsort(1)[:, :k])
        num_tokens = k + fused
    return kept


def naive_masks(kept, batch_size, num_patches, fused):
    """Token lists image by image, stage by stage."""
    masks = np.zeros((batch_size, len(kept), num_patches), bool)
    for b in range(batch_size):
        tokens = list(range(num_patches))
        for stage, idx in enumerate(kept):
            tokens = [tokens[i] for i in idx[b].tolist()]
            for token in tokens:
                if token != 'fused':
                    masks[b, stage, token] = True
            if fused:
                tokens.append('fused')
    return masks


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('num_patches, ks', [(20, (14, 10, 7)), (9, (9, 5)), (6, (1, 1)), (64, (40,)), (5, ())])
def test_positions_compose_as_in_a_naive_loop(num_patches, ks, fused):
    generator = torch.Generator().manual_seed(num_patches)
    for _ in range(10):
        kept = random_kept(4, num_patches, ks, fused, generator)
        before = [idx.clone() for idx in kept]
        masks = compose_positions(kept, 4, num_patches)
        assert masks.dtype == torch.bool and masks.shape == (4, len(ks), num_patches)
        np.testing.assert_array_equal(masks.numpy(), naive_masks(kept, 4, num_patches, fused))
        assert all(torch.equal(*pair) for pair in zip(kept, before))


def test_fused_token_kept_and_fused_again_stands_for_no_patch():
    # Token 2 of the 2nd stage is the 1st fused one; of the 3rd, token 0 is that one again and token 2 the 2nd.
    kept = [torch.tensor([[3, 0]]), torch.tensor([[2, 1]]), torch.tensor([[2, 0]])]
    assert compose_positions(kept, 1, 4)[0].int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('name, kwargs, size, grid', MODELS)
def test_model_keeps_exact_counts_in_nested_masks(name, kwargs, size, grid, fuse):
    model = create(name, fuse_token=fuse, **kwargs)
    images = random_images(size)
    before = images.clone()
    masks = kept_patches(model, images)
    assert masks.dtype == torch.bool and masks.shape == (3, 3, *grid)
    assert not (masks[:, 1:] & ~masks[:, :-1]).any()
    assert torch.equal(images, before)

    # k of the tokens are kept, of which those that were fused by an earlier stage are no patches.
    is_fused = torch.zeros(3, grid[0] * grid[1], dtype=torch.bool)
    for stage, idx in enumerate(model(images, get_idx=True)[1]):
        k = math.ceil(0.7 * is_fused.shape[1])
        is_fused = is_fused.gather(1, idx)
        assert torch.equal(masks[:, stage].sum((1, 2)), k - is_fused.sum(1))
        is_fused = torch.cat([is_fused, torch.ones(3, int(fuse), dtype=torch.bool)], dim=1)


def test_keep_rate_is_that_of_the_call():
    model, images = create(), random_images()
    assert kept_patches(model, images, keep_rate=0.5).sum((0, 2, 3)).tolist() == [3 * 8, 3 * 4, 3 * 2]
    assert kept_patches(model, images, keep_rate=1.).shape == (3, 0, 4, 4)
    rates = [1.] * 12
    rates[5] = 0.5
    assert kept_patches(model, images, keep_rate=rates).sum((0, 2, 3)).tolist() == [3 * 8]


def attend_to_brightness(model):
    """Set by hand: a token's channel 0 is its patch's brightness from first to last block, and draws the attention."""
    nn.init.zeros_(model.pos_embed)
    nn.init.zeros_(model.cls_token)
    nn.init.zeros_(model.patch_embed.proj.weight)
    nn.init.zeros_(model.patch_embed.proj.bias)
    model.patch_embed.proj.weight.data[0] = 1 / model.patch_embed.proj.weight[0].numel()
    width = model.embed_dim
    for block in model.blocks:
        block.norm1 = nn.Identity()
        for layer in block.attn.qkv, block.attn.proj, block.mlp.fc2:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        block.attn.qkv.bias.data[:width] = 1.                   # each query
        block.attn.qkv.weight.data[width:2 * width, 0] = 1.     # each key
    return model


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('name', [TINY, TINY_DISTILLED])
def test_model_with_attention_set_by_hand_keeps_the_patches_set(name, sign, fuse):
    """The brightest patches stay. Weighted by attention, a fused token is nearer to 0 than what it was fused from, so
    that it always goes again where brightness is above 0, and takes one of the k places where it is below."""
    model = attend_to_brightness(create(name, img_size=(64, 96), fuse_token=fuse))
    if model.num_prefix_tokens == 2:
        nn.init.zeros_(model.dist_token)
    rank = torch.rand(3, 24, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1)     # 0: the brightest
    brightness = (24 - rank if sign > 0 else -1 - rank) / 24
    images = brightness.view(3, 1, 4, 6).repeat_interleave(16, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1)

    masks = kept_patches(model, images)
    num_tokens = 24
    for stage in range(3):
        k = math.ceil(0.7 * num_tokens)
        fused_kept = stage if fuse and sign < 0 else 0
        assert torch.equal(masks[:, stage], (rank < k - fused_kept).view(3, 4, 6))
        num_tokens = k + fuse


@pytest.mark.parametrize('name, kwargs, size, grid', MODELS)
def test_dropped_patches_are_black_and_others_as_in_the_input(name, kwargs, size, grid):
    images = random_images(size)
    before = images.clone()
    patch_size = create(name, **kwargs).patch_embed.patch_size
    masks = torch.rand(3, 2, *grid, generator=torch.Generator().manual_seed(0)) < 0.5
    pictures = mask_images(images, masks, patch_size)
    assert pictures.shape == (3, 2, 3, *size) and torch.equal(images, before)
    expected = torch.zeros(3, 2, 3, *size)
    for b, stage, row, col in masks.nonzero().tolist():
        y, x = row * patch_size[0], col * patch_size[1]
        patch = np.s_[..., y:y + patch_size[0], x:x + patch_size[1]]
        expected[b, stage][patch] = denormalize(images)[b][patch]
    assert torch.equal(pictures, expected)


def test_images_are_denormalized_and_clamped():
    images = torch.tensor([[0., 1, -9], [2, 0, 9], [1, 1, 0]]).view(1, 3, 1, 3)
    mean, std = (0.5, 0.25, 0.125), (0.25, 0.125, 0.5)
    expected = torch.tensor([[0.5, 0.75, 0], [0.5, 0.25, 1], [0.625, 0.625, 0.125]]).view(1, 3, 1, 3)
    assert torch.equal(denormalize(images, mean, std), expected)
    masked = mask_images(images, torch.ones(1, 1, 1, 3, dtype=torch.bool), (1, 1), mean, std)
    assert torch.equal(masked[:, 0], expected)
    torch.testing.assert_close(denormalize(torch.zeros(1, 3, 1, 1)).flatten(), torch.tensor(IMAGENET_DEFAULT_MEAN))


def read(path):
    with Image.open(path) as image:
        assert image.format == 'JPEG' and image.mode == 'RGB'
        return torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1)              # (3, H, W)


@pytest.mark.parametrize('patch_size', [8, 12, 16])
def test_files_are_named_counted_and_show_the_masks(tmp_path, patch_size):
    size = (4 * patch_size, 6 * patch_size)
    mean, std = (0.3, 0.5, 0.7), (0.2, 0.3, 0.4)
    model = create(img_size=size, patch_size=patch_size, fuse_token=True)
    pixels = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    pixels = pixels.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    images = normalize(pixels, mean, std)
    output_dir = tmp_path / 'made' / 'here'
    save_masked(model, images, [5, 0], output_dir, mean=mean, std=std)

    assert {path.name for path in output_dir.iterdir()} == {
        f'img_{i}_{kind}.jpg' for i in (0, 5) for kind in ('a', 'l0', 'l1', 'l2')}
    masks = kept_patches(model, images).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    for b, i in enumerate((5, 0)):
        assert (read(output_dir / f'img_{i}_a.jpg') - pixels[b]).abs().mean() < 0.02
        for stage in range(3):
            picture = read(output_dir / f'img_{i}_l{stage}.jpg')
            mask = masks[b, stage].expand(3, -1, -1)
            assert (picture - pixels[b])[mask].abs().mean() < 0.02
            assert picture[~mask].mean() < 0.01


def test_files_round_to_the_nearest_level(tmp_path):
    for level in (0, 0.6, 99.6, 100.4, 254.6, 255):
        save_jpeg(torch.full((3, 8, 16), level / 255), tmp_path / 'grey.jpg')
        assert (read(tmp_path / 'grey.jpg') * 255).unique().tolist() == [round(level)]


def test_processes_that_share_a_folder_miss_and_overwrite_nothing(tmp_path):
    model, images = create(base_keep_rate=0.5), random_images(batch_size=5)
    for rank in range(2):
        save_masked(model, images[rank::2], range(rank, 5, 2), tmp_path / 'two')
    save_masked(model, images, range(5), tmp_path / 'one')
    names = sorted(path.name for path in (tmp_path / 'one').iterdir())
    assert len(names) == 5 * 4 and names == sorted(path.name for path in (tmp_path / 'two').iterdir())
    for name in names:
        assert (read(tmp_path / 'one' / name) - read(tmp_path / 'two' / name)).abs().max() < 0.02


def test_rate_1_writes_the_inputs_alone(tmp_path):
    save_masked(create(), random_images(batch_size=2), [0, 1], tmp_path, keep_rate=1.)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['img_0_a.jpg', 'img_1_a.jpg']


def test_wrong_number_of_indices_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match='2 indices for 3 images'):
        save_masked(create(), random_images(), [0, 1], tmp_path / 'none')
    assert not (tmp_path / 'none').exists()
