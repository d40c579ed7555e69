"""token_labels.py: label maps that follow crop, flip and selection, MixToken, the errors."""
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import main
from datasets import SeededDataset, build_dataset
from formats.fast_transforms import EncodedImage
from formats.token_labels import LabelledTokens, TokenLabeling, labels_of_patches
from losses import TokenLabelingLoss
from outputs import log_lines
from runtime.utils import DataError, seed_all

CELLS = 6                                              # of a map, in each direction
LV = ['--model', 'lvvit_s_shrink_base', '--fuse_token', '--drop_loc', '0,1', '--input-size', '32', '--batch-size', '8',
      '--model-kwargs', 'patch_size=8', 'embed_dim=32', 'num_heads=2', 'depth=2', '--warmup-epochs', '0',
      '--shrink_start_epoch', '0', '--mixup', '0', '--cutmix', '0', '--num_workers', '0', '--device', 'cpu']


def label_map(classes, others=True):
    """A map whose best class in each cell is given, (H, W); four others have the score 0, or there are none."""
    numbers = torch.stack([(classes + i) % 36 if others else classes for i in range(5)])
    scores = torch.full_like(numbers, 20. * (not others), dtype=torch.float32)
    scores[0] = 20.
    return torch.stack([scores.half(), numbers.half()])


@pytest.fixture
def maps(image_folder, tmp_path):
    """A folder with a map for each training image, whose classes are 0, 1 and 2 in thirds from left to right."""
    thirds = torch.arange(CELLS).div(CELLS / 3, rounding_mode='floor').expand(CELLS, CELLS).contiguous()
    for path, _ in ImageFolder(image_folder / 'train').samples:
        file = tmp_path / 'maps' / path.removeprefix(f'{image_folder}/train/').replace('.png', '.pt')
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(label_map(thirds, others=False), file)
    return tmp_path / 'maps'


def training_set(image_folder, maps, **options):
    return LabelledTokens(build_dataset(True, data_set='IMNET', data_path=image_folder, **options), maps)


# --- Labels of patches ----------------------------------------------------------------------------------------------

def test_labels_follow_the_selection():
    """Each cell has its own class, the grid of patches is that of the map: each patch has the class of its cell."""
    torch.manual_seed(0)
    classes = torch.arange(36).reshape(6, 6)
    label_maps = torch.stack([label_map(classes), label_map(classes.flip(0))])
    labeling = TokenLabeling(36, (6, 6), mix=False)
    targets, mixed = labeling(torch.tensor([3, 7]), label_maps, torch.tensor([[0., 0, 1, 1], [0, 0, 1, 1]]))
    assert not mixed.any() and targets.images.argmax(1).tolist() == [3, 7]
    smoothed, _ = TokenLabeling(36, (6, 6), 0.36, mix=False)(torch.tensor([3, 7]), label_maps,
                                                             torch.tensor([[0., 0, 1, 1], [0, 0, 1, 1]]))
    torch.testing.assert_close(smoothed.patches, 0.64 * targets.patches + 0.01)
    assert torch.equal(targets.patches.argmax(2), torch.stack([classes, classes.flip(0)]).flatten(1))
    torch.testing.assert_close(targets.patches.sum(2), torch.ones(2, 36))
    patches = torch.stack([torch.randperm(36)[:5] for _ in range(2)])                  # that remain
    patches[1, 4] = 36                                                                 # and a fused one
    right = torch.stack([torch.eye(36)[targets.patches[i].argmax(1)[patches[i].clamp(max=35)]] for i in range(2)])
    right[1, 4] = torch.nan_to_num(right[1, 4]) * -1                                   # whose logits do not matter
    outputs = torch.zeros(2, 36), 100 * right, patches
    loss = TokenLabelingLoss(1.)(None, outputs, targets)
    assert loss - torch.tensor(36.).log() < 1e-3
    wrong = (outputs[0], outputs[1].roll(1, dims=1), patches)
    assert TokenLabelingLoss(1.)(None, wrong, targets) > 10


@pytest.mark.parametrize('flip', [False, True])
def test_crop_and_flip(flip):
    """Half of the map: the patches have the classes of its columns, averaged where a patch covers several cells."""
    classes = torch.arange(CELLS).expand(CELLS, CELLS).contiguous()
    one, box = label_map(classes)[None], torch.tensor([[0., 0., 0.5, 1.]])
    if flip:
        one, box = one.flip(-1), torch.tensor([[0.5, 0., 1., 1.]])
    labels = labels_of_patches(one, box, 36, (6, 3)).reshape(6, 3, 36)
    assert labels.argmax(2).tolist() == 6 * [[2, 1, 0] if flip else [0, 1, 2]]
    pair = labels_of_patches(one, torch.tensor([[0., 0., 1., 1.]]), 36, (1, 3))[0]     # two columns each
    best = pair.topk(2).indices.sort(1).values.tolist()
    assert best == ([[4, 5], [2, 3], [0, 1]] if flip else [[0, 1], [2, 3], [4, 5]])
    # A class that is not among the best five of a cell has the score 0 there
    assert pair[0, best[0][0]] == pytest.approx(pair[0, best[0][1]].item(), rel=1e-3)


def test_map_that_is_no_square():
    """4 rows and 6 columns, of which the image shows the last three rows and the middle columns."""
    classes = torch.arange(24).reshape(4, 6)
    labels = labels_of_patches(label_map(classes)[None], torch.tensor([[1 / 3, 1 / 4, 2 / 3, 1.]]), 36, (3, 2))
    assert torch.equal(labels[0].argmax(1).reshape(3, 2), classes[1:, 2:4])


def test_labels_of_the_image():
    labeling = TokenLabeling(4, (2, 3), smoothing=0.1, mix=False)
    targets, _ = labeling(torch.tensor([1, 2]))
    expected = torch.full((2, 4), 0.025)
    expected[0, 1] = expected[1, 2] = 0.925
    torch.testing.assert_close(targets.images, expected)
    torch.testing.assert_close(targets.patches, expected[:, None].expand(2, 6, 4))
    soft = torch.rand(2, 4).softmax(1)                                                 # as mixup makes them
    targets, _ = labeling(soft)
    assert torch.equal(targets.images, soft) and torch.equal(targets.patches[:, 3], soft)


def test_mix_token():
    """A rectangle, of the reversed batch; the label of the image by area; the same draws for the same seed."""
    labeling, labels = TokenLabeling(3, (4, 6)), torch.tensor([0, 1, 2])
    shares = []
    for seed in range(40):
        seed_all(seed)
        targets, mixed = labeling(labels)
        seed_all(seed)
        assert torch.equal(labeling(labels)[1], mixed)
        rows, columns = (mixed.reshape(4, 6).any(dim) for dim in (1, 0))
        assert torch.equal(mixed.reshape(4, 6), rows[:, None] & columns) and mixed.shape == (24,)
        share = mixed.float().mean()
        shares.append(share)
        torch.testing.assert_close(targets.images[0], torch.tensor([1 - share, 0, share]))
        assert targets.patches.argmax(2).tolist() == [[2 - label if there else label for there in mixed]
                                                      for label in (0, 1, 2)]
    assert min(shares) < 0.1 and max(shares) > 0.6 and len(set(shares)) > 10 and 0.2 < sum(shares) / 40 < 0.45


# --- The data set ---------------------------------------------------------------------------------------------------

def test_images_and_boxes(image_folder, maps):
    """The images are those without label maps; the map shows the part of the picture that the image does."""
    options = dict(input_size=32, aa='', color_jitter=0.)
    plain = SeededDataset(build_dataset(True, data_set='IMNET', data_path=image_folder, **options))
    flips = 0
    for fast in (False, True):
        labelled = training_set(image_folder, maps, fast_transforms=fast, **options)
        assert (len(labelled), labelled.classes) == (24, ['blue', 'green', 'red'])
        # A picture that tells its columns in red, its rows in green
        ramp = np.zeros((40, 60, 3), np.uint8)
        ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 60), np.linspace(0, 255, 40)[:, None]
        for key in range(12):
            image, label, found, box = SeededDataset(labelled)[5, (key,)]
            expected, expected_label = SeededDataset(build_dataset(
                True, data_set='IMNET', data_path=image_folder, fast_transforms=fast, **options))[5, (key,)]
            assert torch.equal(torch.as_tensor(image), torch.as_tensor(expected)) and label == expected_label
            labelled.dataset.loader, load = lambda path: main_picture(ramp, fast), labelled.dataset.loader
            image, _, found, box = SeededDataset(labelled)[5, (key,)]
            labelled.dataset.loader = load
            flipped = found[1, 0, 0, 0] > found[1, 0, 0, -1]
            flips += flipped
            position = torch.as_tensor(np.asarray(image)).float()[0, 16] / 255         # of each column, 0 to 1
            edges = torch.tensor([box[0], box[2]]) if not flipped else 1 - torch.tensor([box[0], box[2]])
            torch.testing.assert_close(position[[1, -2]], edges, atol=0.06, rtol=0)
            row = torch.as_tensor(np.asarray(image)).float()[1, :, 16] / 255
            torch.testing.assert_close(row[[1, -2]], box[[1, 3]], atol=0.06, rtol=0)
            assert 0 <= box.min() and box.max() <= 1 and box[0] < box[2] and box[1] < box[3]
    assert 4 < flips < 20 and len(plain) == 24


def main_picture(pixels, encoded):
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.save(file, 'PNG')
    return EncodedImage(file.getvalue(), None) if encoded else picture


def test_training_with_label_maps(image_folder, maps, tmp_path):
    """The same run, with workers or without; with other maps, another."""
    def losses(name, *flags):
        main.main(main.parse_args([*LV, '--data-path', str(image_folder), '--token-label-path', str(maps), '--epochs',
                                   '2', '--output_dir', str(tmp_path / name), *flags]))
        return [line['train_loss'] for line in log_lines(tmp_path / name)]

    first = losses('a')
    assert losses('b', '--num_workers', '1') == first
    for file in maps.rglob('*.pt'):
        one = torch.load(file)
        one[1] = 2 - one[1]
        torch.save(one, file)
    assert losses('c') != first


@pytest.mark.parametrize('spoil, message', [
    (lambda file: file.unlink(), '0.pt is missing; each training image needs a label map'),
    (lambda file: file.write_bytes(b'no tensor'), '0.pt cannot be read as a tensor'),
    (lambda file: torch.save(torch.zeros(3, 5, 6, 6), file), r'has the shape \(3, 5, 6, 6\); \(2, 5, 18, 18\) is exp'),
    (lambda file: torch.save({'a': 1}, file), 'has the shape not of a tensor of numbers; '),
    (lambda file: torch.save(torch.zeros(2, 5, 6, 6) > 0, file), 'has the shape not of a tensor of numbers; '),
    (lambda file: torch.save(torch.zeros(2, 5, 6, 6).to_sparse(), file), 'has the shape not of a tensor of numbers; '),
    (lambda file: torch.save(torch.zeros(2, 5, 0, 6), file), r'has the shape \(2, 5, 0, 6\); '),
    (lambda file: torch.save(torch.full((2, 5, 6, 6), torch.nan), file), '0.pt has a score that is not finite, or'),
    (lambda file: torch.save(torch.full((2, 5, 6, 6), 3.), file), 'names a class outside 0 to 2')])
def test_wrong_maps(spoil, message, image_folder, maps):
    spoil(maps / 'blue' / '0.pt')
    with pytest.raises(DataError, match=message):
        training_set(image_folder, maps)


def test_maps_of_several_sizes(image_folder, maps):
    dataset = training_set(image_folder, maps)
    torch.save(torch.zeros(2, 5, 7, 7), maps / 'red' / '7.pt')
    with pytest.raises(DataError, match=r'red/7.pt has the shape \(2, 5, 7, 7\); \(2, 5, 6, 6\) is expected'):
        dataset[23]
    state = random.getstate()
    assert dataset[22][2].shape == (2, 5, 6, 6) and random.getstate() != state
