import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import normalize

import models_evit                                     # noqa: F401, registers the models
from conftest import ROOT
from evit import pictures as module
from evit.observation import compose_positions, kept_patches, observe
from evit.pictures import (ABSENT, HEAT, SHEET_WIDTH, attention_images, contact_sheet, denormalize, draw_sheets, fit,
                           mask_images, merge_images, shorten, to_bytes)
from visualize_mask import save_jpeg, save_masked

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
    """Normalised images (B, 3, H, W) whose pixels were between 0.2 and 0.8."""
    pixels = 0.2 + 0.6 * torch.rand(batch_size, 3, *size, generator=torch.Generator().manual_seed(0))
    return normalize(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def random_kept(batch_size, num_patches, ks, fused, generator):
    """Random positions, one tensor (B, k) per stage, in any order, as a model with or without fused tokens returns."""
    kept, num_tokens = [], num_patches
    for k in ks:
        kept.append(torch.rand(batch_size, num_tokens, generator=generator).argsort(1)[:, :k])
        num_tokens = k + fused
    return kept


def naive_masks(kept, batch_size, num_patches, fused):
    """The masks from lists of tokens, image by image and stage by stage."""
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
def test_positions_against_a_naive_loop(num_patches, ks, fused):
    generator = torch.Generator().manual_seed(num_patches)
    for _ in range(10):
        kept = random_kept(4, num_patches, ks, fused, generator)
        before = [idx.clone() for idx in kept]
        masks = compose_positions(kept, 4, num_patches)
        assert masks.dtype == torch.bool and masks.shape == (4, len(ks), num_patches)
        np.testing.assert_array_equal(masks.numpy(), naive_masks(kept, 4, num_patches, fused))
        assert all(torch.equal(*pair) for pair in zip(kept, before))


def test_fused_token_kept_and_fused_again():
    # In the 2nd stage, token 2 is the 1st fused token. In the 3rd, it is token 0, and token 2 is the 2nd fused token.
    kept = [torch.tensor([[3, 0]]), torch.tensor([[2, 1]]), torch.tensor([[2, 0]])]
    assert compose_positions(kept, 1, 4)[0].int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_stage_that_keeps_all():
    kept = [None, torch.tensor([[3, 0]]), None, torch.tensor([[2, 1]])]
    assert compose_positions(kept, 1, 4)[0].int().tolist() == [
        [1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]]


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('name, kwargs, size, grid', MODELS)
def test_counts_and_nesting_of_masks(name, kwargs, size, grid, fuse):
    model = create(name, fuse_token=fuse, **kwargs)
    images = random_images(size)
    before = images.clone()
    masks = kept_patches(model, images)
    assert masks.dtype == torch.bool and masks.shape == (3, 3, *grid)
    assert not (masks[:, 1:] & ~masks[:, :-1]).any()
    assert torch.equal(images, before)

    # Each stage keeps k tokens. Kept tokens that an earlier stage fused are not patches.
    is_fused = torch.zeros(3, grid[0] * grid[1], dtype=torch.bool)
    for stage, idx in enumerate(model(images, get_idx=True)[1]):
        k = math.ceil(0.7 * is_fused.shape[1])
        is_fused = is_fused.gather(1, idx)
        assert torch.equal(masks[:, stage].sum((1, 2)), k - is_fused.sum(1))
        is_fused = torch.cat([is_fused, torch.ones(3, int(fuse), dtype=torch.bool)], dim=1)


def test_keep_rate_of_a_call():
    model, images = create(), random_images()
    assert kept_patches(model, images, keep_rate=0.5).sum((0, 2, 3)).tolist() == [3 * 8, 3 * 4, 3 * 2]
    rates = [1.] * 12
    rates[5] = 0.5
    seen = observe(model, images, keep_rate=rates)
    assert seen.blocks == [3, 5, 6, 9] and seen.kept.sum((0, 2, 3)).tolist() == [3 * 16, 3 * 8, 3 * 8, 3 * 8]


def test_rate_1():
    seen = observe(create(), random_images(), keep_rate=1.)
    assert seen.blocks == [3, 6, 9] and seen.kept.shape == (3, 3, 4, 4) and seen.kept.all()
    assert (seen.attention > 0).all() and (seen.attention.sum((2, 3)) < 1).all()
    assert observe(create(drop_loc=()), random_images()).kept.shape == (3, 0, 4, 4)


def test_sheets_of_a_backbone_without_a_head():
    batches = [(random_images(), torch.zeros(3, dtype=torch.long))]
    without, with_head = (draw_sheets(create(num_classes=n), batches, ['a'] * 10)[0] for n in (0, 10))
    assert without.width == with_head.width and without.height < with_head.height


def test_stages_of_token_counts():
    model = create(token_counts=2 * (17,) + 2 * (9,) + 8 * (5,))
    assert observe(model, random_images()).blocks == [2, 4] and len(model(random_images(), get_idx=True)[1]) == 2


@pytest.mark.parametrize('checkpointing', [False, True])
def test_observed_model_is_unchanged(checkpointing):
    model, images = create(TINY_DISTILLED, proj_drop_rate=0.5, drop_path_rate=0.5), random_images()
    model.set_grad_checkpointing(checkpointing)
    expected = model(images)
    model.blocks[2].train()
    model.training = True                                   # as in distillation: the model, but not all of its layers
    model.set_distilled_training()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    seen = observe(model, images)
    assert torch.equal(seen.logits, expected)
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert not seen.logits.requires_grad and not seen.attention.requires_grad


def attend_to_brightness(model):
    """Set the weights by hand. In all blocks, channel 0 of a token is the brightness of its patch, and is its key."""
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
def test_kept_patches_for_attention_set_by_hand(name, sign, fuse):
    """The brightest patches are kept. Weighting by attention brings a fused token closer to 0 than the tokens it was
    fused from. It is therefore always fused again if brightness is positive, and is one of the k kept tokens if
    brightness is negative."""
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


@pytest.mark.parametrize('fuse', [False, True])
@pytest.mark.parametrize('name', [TINY, TINY_DISTILLED])
def test_attention_set_by_hand(name, fuse):
    """A head has 16 channels. Queries are 1 and keys are the brightness b of a patch: logits are 16 b / √16 = 4 b."""
    model = attend_to_brightness(create(name, img_size=(64, 96), fuse_token=fuse))
    if model.num_prefix_tokens == 2:
        nn.init.zeros_(model.dist_token)
    brightness = torch.rand(3, 24, generator=torch.Generator().manual_seed(2))
    images = brightness.view(3, 1, 4, 6).repeat_interleave(16, 2).repeat_interleave(16, 3).expand(-1, 3, -1, -1)

    seen = observe(model, images)
    assert seen.attention.shape == (3, 3, 4, 6)
    attention, kept = seen.attention.flatten(2), seen.kept.flatten(2)
    whole = brightness.mul(4).exp()
    torch.testing.assert_close(attention[:, 0], whole / (whole.sum(1, keepdim=True) + model.num_prefix_tokens))
    for stage in (1, 2):
        assert torch.equal(~attention[:, stage].isnan(), kept[:, stage - 1])           # candidates: patches still kept
        for b in range(3):
            left = kept[b, stage - 1]
            constant = attention[b, stage, left].log() - 4 * brightness[b, left]
            torch.testing.assert_close(constant, constant[:1].expand_as(constant), atol=1e-3, rtol=0)
            total = attention[b, stage, left].sum() + model.num_prefix_tokens * constant[0].exp()
            assert total < 0.999 if fuse else total == pytest.approx(1, abs=1e-3)      # the rest is on fused tokens


@pytest.mark.parametrize('name, kwargs, size, grid', MODELS)
def test_kept_patches_have_the_highest_attention(name, kwargs, size, grid):
    seen = observe(create(name, fuse_token=True, **kwargs), random_images(size))
    attention = seen.attention
    assert attention.shape == (3, 3, *grid)
    least_kept = attention.masked_fill(~seen.kept, math.inf).amin((2, 3))
    most_dropped = attention.nan_to_num(0).masked_fill(seen.kept, 0).amax((2, 3))
    assert (least_kept >= most_dropped).all() and (most_dropped > 0).all()


@pytest.mark.parametrize('name, kwargs, size, grid', MODELS)
def test_mask_images(name, kwargs, size, grid):
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


def test_denormalize():
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
def test_files(tmp_path, patch_size):
    size = (4 * patch_size, 6 * patch_size)
    mean, std = (0.3, 0.5, 0.7), (0.2, 0.3, 0.4)
    model = create(img_size=size, patch_size=patch_size, fuse_token=True)
    pixels = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    pixels = pixels.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    images = normalize(pixels, mean, std)
    output_dir = tmp_path / 'made' / 'here'
    save_masked(model, images, [5, 0], output_dir, mean=mean, std=std)

    assert {path.name for path in output_dir.iterdir()} == {
        f'img_{i}_{kind}.jpg' for i in (0, 5) for kind in ('a', 'block3', 'block6', 'block9')}
    masks = kept_patches(model, images).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    for b, i in enumerate((5, 0)):
        assert (read(output_dir / f'img_{i}_a.jpg') - pixels[b]).abs().mean() < 0.02
        for stage in range(3):
            picture = read(output_dir / f'img_{i}_block{3 * stage + 3}.jpg')
            mask = masks[b, stage].expand(3, -1, -1)
            assert (picture - pixels[b])[mask].abs().mean() < 0.02
            assert picture[~mask].mean() < 0.01


def test_rounding_of_files(tmp_path):
    for level in (0, 0.6, 99.6, 100.4, 254.6, 255):
        save_jpeg(torch.full((3, 8, 16), level / 255), tmp_path / 'grey.jpg')
        assert (read(tmp_path / 'grey.jpg') * 255).unique().tolist() == [round(level)]


def test_folder_shared_by_processes(tmp_path):
    model, images = create(base_keep_rate=0.5), random_images(batch_size=5)
    for rank in range(2):
        save_masked(model, images[rank::2], range(rank, 5, 2), tmp_path / 'two')
    save_masked(model, images, range(5), tmp_path / 'one')
    names = sorted(path.name for path in (tmp_path / 'one').iterdir())
    assert len(names) == 5 * 4 and names == sorted(path.name for path in (tmp_path / 'two').iterdir())
    for name in names:
        assert (read(tmp_path / 'one' / name) - read(tmp_path / 'two' / name)).abs().max() < 0.02


def test_files_at_rate_1(tmp_path):
    save_masked(create(), random_images(batch_size=2), [0, 1], tmp_path, keep_rate=1.)
    assert len(list(tmp_path.iterdir())) == 2 * 4
    for i in range(2):
        for stage in range(3):
            masked = tmp_path / f'img_{i}_block{3 * stage + 3}.jpg'
            assert masked.read_bytes() == (tmp_path / f'img_{i}_a.jpg').read_bytes()


def test_wrong_number_of_indices(tmp_path):
    with pytest.raises(ValueError, match='2 indices for 3 images'):
        save_masked(create(), random_images(), [0, 1], tmp_path / 'none')
    assert not (tmp_path / 'none').exists()


# --- Heat maps and sheets -------------------------------------------------------------------------------------------

def test_heat_maps():
    mean, std = (0.3, 0.5, 0.7), (0.2, 0.3, 0.4)
    pixels = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))       # 1 pixel beyond whole patches
    attention = torch.tensor([[[[0.1, 0.5, math.nan], [0.2, 0.3, 0.15]], [[0.25] * 3] * 2, [[math.nan] * 3] * 2]])
    stops = torch.tensor(HEAT) / 255
    between = (stops[0] + stops[1]) / 2
    expected = [[[stops[0], stops[4], None], [stops[1], stops[2], between]], [[stops[0]] * 3] * 2, [[None] * 3] * 2]
    images = normalize(pixels, mean, std)
    before = images.clone()
    maps = attention_images(images, attention, (4, 4), mean, std)
    assert maps.shape == (1, 3, 3, 9, 13) and torch.equal(images, before)
    grey = (pixels[0] * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    for stage in range(3):
        assert (maps[0, stage, :, 8] == ABSENT).all() and (maps[0, stage, :, :, 12] == ABSENT).all()
        for row in range(2):
            for col in range(3):
                patch = np.s_[..., 4 * row:4 * row + 4, 4 * col:4 * col + 4]
                color = expected[stage][row][col]
                wanted = torch.full((3, 4, 4), ABSENT) if color is None else (
                    0.4 * grey[patch] + 0.6 * color.view(3, 1, 1))
                torch.testing.assert_close(maps[0, stage][patch], wanted, atol=1e-4, rtol=0)


def drawn(monkeypatch, *arguments):
    """The result of `contact_sheet`, and its texts as [(text, its bounding box (left, top, right, bottom))]."""
    texts, text = [], ImageDraw.ImageDraw.text

    def note(self, xy, string, fill, font):
        texts.append((string, self.textbbox(xy, string, font)))
        text(self, xy, string, fill, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, 'text', note)
    return contact_sheet(*arguments), texts


@pytest.mark.parametrize('number, columns, size, picture, across', [
    (1, 4, (48, 48), (192, 192), 1), (4, 4, (224, 224), (224, 224), 1), (5, 4, (48, 48), (192, 192), 2),
    (8, 4, (288, 288), (203, 203), 2), (8, 4, (160, 406), (80, 203), 2), (12, 4, (224, 224), (133, 133), 3),
    (18, 4, (48, 48), (96, 96), 4), (13, 4, (32, 64), (32, 64), 4), (3, 4, (300, 10), (224, 7), 1),
    (18, 4, (40, 10), (80, 20), 4), (7, 13, (224, 224), (124, 124), 1), (70, 1, (90, 90), (89, 89), 16),
    (9, 1, (224, 224), (224, 224), 3)])
def test_layout_of_a_sheet(number, columns, size, picture, across, monkeypatch):
    headers = ['input image', *(f'block {i}' for i in range(columns - 1))]
    colors = torch.arange(1, number * columns + 1).view(number, columns)
    rows = [torch.stack([color % 256, color // 256, torch.full_like(color, 77)], dim=1).byte().view(columns, 3, 1, 1)
            .expand(-1, -1, *size) for color in colors]
    captions = [(f'true: {i}', 'predicted: ' + 'sulphur-crested cockatoo ' * 20) for i in range(number)]
    sheet, texts = drawn(monkeypatch, rows, headers, captions)
    assert sheet.mode == 'RGB' and sheet.width <= SHEET_WIDTH
    pixels = np.asarray(sheet).astype(int)
    number_of = np.where(pixels[..., 2] == 77, pixels[..., 0] + 256 * pixels[..., 1], 0)

    places = {}
    for i in range(number):
        for column in range(columns):
            y, x = np.nonzero(number_of == colors[i, column].item())
            assert len(y) == picture[0] * picture[1], (i, column)                      # nothing is drawn over it
            assert (y.max() - y.min() + 1, x.max() - x.min() + 1) == picture
            places[i, column] = x.min(), y.min(), x.max(), y.max()
    assert len({places[i, 0][1] for i in range(number)}) == math.ceil(number / across)
    for i in range(across, number):
        assert places[i, 0][0] == places[i - across, 0][0]                             # in the same column
    for i in range(number - 1):
        assert (places[i, 0][1], places[i, 0][0]) < (places[i + 1, 0][1], places[i + 1, 0][0])

    boxes = dict(zip([text for text, _ in texts], [box for _, box in texts]))
    for text, (left, top, right, bottom) in texts:
        assert 0 <= left and right <= sheet.width and 0 <= top and bottom <= sheet.height, text
    heads = [(text, box) for text, box in texts if text in headers]
    assert [text for text, _ in heads] == headers * min(across, number)
    for place, (text, box) in enumerate(heads):
        picture_place = places[place // columns, place % columns]
        assert abs(box[0] - picture_place[0]) <= 3 and box[3] <= picture_place[1]
        if place + 1 < len(heads):
            assert box[2] < heads[place + 1][1][0]                                     # headers do not overlap
    long = [box for text, box in texts if text.startswith('predicted: ')]
    assert len(long) == number and all(text.endswith('…') for text, _ in texts if text.startswith('predicted: '))
    for i in range(number):
        assert boxes[f'true: {i}'][1] > places[i, 0][3] and long[i][1] > boxes[f'true: {i}'][1]
        if i + across < number:
            assert long[i][3] <= places[i + across, 0][1]
        if (i + 1) % across and i + 1 < number:
            assert long[i][2] < places[i + 1, 0][0]


def test_scaling_of_pictures():
    digit = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sheet = np.asarray(contact_sheet([digit], [''], [('',)]))
    enlarged = digit[0].permute(1, 2, 0).repeat_interleave(5, 0).repeat_interleave(5, 1).numpy()
    y, x = np.argwhere((sheet != 255).any(-1))[0]
    np.testing.assert_array_equal(sheet[y:y + 200, x:x + 200], enlarged)
    lines = (torch.arange(448) % 2 * 255).byte().expand(1, 3, 448, 448)                # black and white columns
    assert 100 < np.asarray(contact_sheet([lines], [''], [('',)]))[100, 100].mean() < 160
    assert [fit(48, 48, 100), fit(130, 60, 200), fit(400, 200, 100), fit(1, 900, 90)] == [
        (96, 96), (130, 60), (100, 50), (1, 90)]


def test_shortened_names():
    font = ImageFont.load_default(16)
    name = 'sulphur-crested cockatoo, Kakatoe galerita'
    assert shorten(name, font, font.getlength(name)) == name
    for width in range(30, int(font.getlength(name)), 7):
        short = shorten(name, font, width)
        assert short.endswith('…') and name.startswith(short[:-1]) and font.getlength(short) <= width
        assert font.getlength(name[:len(short)] + '…') > width
    assert shorten('Käfer, naïve Ærø 鳥', font, 999) == 'Kafer, naive ?r? ?'


@pytest.mark.parametrize('name, kwargs, size, grid', MODELS)
def test_content_of_sheets(name, kwargs, size, grid, monkeypatch):
    mean, std = (0.3, 0.5, 0.7), (0.2, 0.3, 0.4)
    model, images = create(name, num_classes=3, drop_loc=(2, 5), fuse_token=True, **kwargs), random_images(size)
    sheets = []
    monkeypatch.setattr(module, 'contact_sheet', lambda *arguments: sheets.append(arguments) or len(sheets))
    batches = [(images[:2], torch.tensor([2, 0])), (images[2:], torch.tensor([1]))]
    assert draw_sheets(model, batches, ['a', 'b', 'c'], 0.5, mean, std) == (1, 2)
    seen, patch_size = observe(model, images, 0.5), model.patch_embed.patch_size
    pictures = (mask_images(images, seen.kept, patch_size, mean, std),
                attention_images(images, seen.attention, patch_size, mean, std))
    for stages, (rows, headers, captions) in zip(pictures, sheets):
        assert headers == ['input image', 'block 2', 'block 5']
        assert captions == [(f'true: {true}', f'predicted: {"abc"[guess]}')
                            for true, guess in zip('cab', seen.logits.argmax(1))]
        for b in range(3):
            assert torch.equal(rows[b][:1], to_bytes(denormalize(images[b:b + 1], mean, std)))
            assert (rows[b][1:].int() - to_bytes(stages[b]).int()).abs().max() <= 1


def test_sheets_change_no_generator_and_no_mode():
    model = create().train()
    loader = DataLoader(TensorDataset(random_images(), torch.zeros(3, dtype=torch.long)), 2)
    state = torch.get_rng_state()
    grid, attention = draw_sheets(model, loader, ['a'] * 1000)
    assert grid.size == attention.size and grid.tobytes() != attention.tobytes()
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())


def test_notebook_lines_of_the_docs():
    block, = (block for block in (ROOT / 'docs' / 'models.md').read_text().split('```') if 'kept_patches' in block)
    lines = block.removeprefix('python\n').splitlines()
    assert len(lines) == 6
    shown = []
    names = dict(model=create(num_classes=2).train(), images=random_images(), labels=torch.tensor([0, 1, 1]),
                 classes=['cat', 'dog'], plt=SimpleNamespace(imshow=shown.append))
    exec('\n'.join(lines), names)
    assert shown[0].shape == (64, 64, 3) and names['grid'].size == names['attention'].size


# --- Merged tokens --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, kwargs, size, grid', [MODELS[1], MODELS[2], MODELS[6]])
def test_patches_that_became_one_token(name, kwargs, size, grid):
    """Against sets of patches, joined one by one; a merged patch has the mean colour of its group."""
    model, images = create(name, merge_token=True, drop_loc=(3, 6, 9), **kwargs), random_images(size)
    stages = []
    for block in (model.blocks[i] for i in model.token_settings.drop_loc):
        block.register_forward_hook(lambda block, args, output: stages.append(output[1]))
    seen = observe(model, images, 0.6)
    pictures = merge_images(images, seen.groups, model.patch_embed.patch_size)
    num_patches, height = grid[0] * grid[1], model.patch_embed.patch_size[0]
    pixels = denormalize(images)
    for b in range(len(images)):
        tokens = [{patch} for patch in range(num_patches)]
        for i, stage in enumerate(stages):
            joined = [set(tokens[position]) for position in stage.idx[b].tolist()]
            for position, target in zip(stage.other_idx[b].tolist(), stage.nearest[b].tolist(), strict=True):
                joined[target] |= tokens[position]
            tokens = joined
            groups = seen.groups[b, i].flatten().tolist()
            assert sorted(map(sorted, tokens)) == sorted(
                [patch for patch in range(num_patches) if groups[patch] == group] for group in set(groups))
            assert [len(patches) for patches in tokens] == stage.sizes[b].tolist()
            for patches in tokens:
                squares = [(..., slice(row * height, (row + 1) * height), slice(col * height, (col + 1) * height))
                           for row, col in (divmod(patch, grid[1]) for patch in patches)]
                mean = torch.stack([pixels[b][square].mean((1, 2)) for square in squares]).mean(0)
                for square in squares:
                    expected = pixels[b][square] if len(patches) == 1 else mean[:, None, None].expand(3, height, height)
                    torch.testing.assert_close(pictures[b, i][square], expected)


def test_sheets_of_merged_tokens():
    model, images = create(merge_token=True), random_images()
    batches, classes = [(images, torch.zeros(3, dtype=torch.long))], 1000 * ['a']
    grid = draw_sheets(model, batches, classes)[0]
    dropped = draw_sheets(models_evit.to_evit(model, way='drop'), batches, classes)[0]
    assert (np.asarray(dropped) == 0).all(-1).sum() > (np.asarray(grid) == 0).all(-1).sum()
