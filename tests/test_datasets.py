import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from datasets import Digits, INaturalist, SeededDataset, build_dataset, build_transform, check_same_classes
from main import parse_args
from samplers import TrainSampler
from utils import InputError


def test_digits_are_split_once_and_whole():
    train, val = Digits(train=True), Digits(train=False)
    assert (len(train), len(val)) == (1437, 360)
    pixels = sorted(image.tobytes() for image in (*train.images, *val.images))
    assert pixels == sorted((image * (255 / 16)).astype(np.uint8).tobytes() for image in load_digits().images)
    assert Digits(train=True).targets == train.targets and set(val.targets) == set(range(10))
    image, label = val[3]
    assert image.mode == 'RGB' and image.size == (8, 8) and label == val.targets[3]


@pytest.fixture
def inat(tmp_path):
    """Two genera in three species; species 7 comes first in the training annotations."""
    categories = [{'id': 7, 'name': 'b b', 'genus': 'b'}, {'id': 3, 'name': 'a a', 'genus': 'a'},
                  {'id': 5, 'name': 'b c', 'genus': 'b'}]
    (tmp_path / 'categories.json').write_text(json.dumps(categories))
    for split, ids in (('train', [7, 3, 5, 7]), ('val', [3, 5])):
        images = [{'id': i, 'file_name': f'{split}_val2018/Birds/{category}/{i}.jpg'} for i, category in enumerate(ids)]
        annotations = [{'image_id': i, 'category_id': category} for i, category in enumerate(ids)]
        (tmp_path / f'{split}2018.json').write_text(json.dumps({'images': images, 'annotations': annotations}))
        for i, category in enumerate(ids):
            path = tmp_path / f'{split}_val2018' / str(category) / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4), (category * 10, 0, 0)).save(path)
    return tmp_path


def test_inaturalist(inat):
    train, val = INaturalist(inat, True, 2018), INaturalist(inat, False, 2018)
    assert train.classes == val.classes == ['b b', 'a a', 'b c']
    assert (train.targets, val.targets) == ([0, 1, 2, 0], [1, 2])
    assert INaturalist(inat, True, 2018, 'genus').targets == [0, 1, 0, 0]
    for dataset, ids in ((train, [7, 3, 5, 7]), (val, [3, 5])):
        assert [round(dataset[i][0].getpixel((0, 0))[0] / 10) for i in range(len(dataset))] == ids
    with pytest.raises(InputError, match='train2019.json is missing'):
        INaturalist(inat, True, 2019)


def test_image_folder(image_folder):
    args = parse_args(['--data-path', str(image_folder), '--input-size', '32'])
    train, val = build_dataset(True, args), build_dataset(False, args)
    assert train.classes == val.classes == ['blue', 'green', 'red'] and (len(train), len(val)) == (24, 9)
    image, label = val[0]
    assert image.shape == (3, 32, 32) and image.mean(dim=(1, 2)).argmax() == 2 and label == 0
    check_same_classes(train, val)
    val.classes = ['blue', 'yellow', 'red']
    with pytest.raises(InputError, match='green is in train only, yellow is in val only'):
        check_same_classes(train, val)


@pytest.mark.parametrize('wrong', [{'genus': None}, {'annotations': 3}, {'images': [{'file_name': 'a/b.jpg'}]},
                                   {'images': [{'file_name': 'a/b/77/c.jpg'}]}])
def test_odd_annotations_of_inaturalist_are_named(wrong, inat):
    path = inat / ('categories.json' if 'genus' in wrong else 'train2018.json')
    content = json.loads(path.read_text())
    path.write_text(json.dumps([{'id': 7, 'name': 'b b'}] if 'genus' in wrong else content | wrong))
    with pytest.raises(InputError, match='iNaturalist 2018'):
        INaturalist(inat, True, 2018, 'genus')
    path.write_text('{')
    with pytest.raises(InputError, match=f'{path.name} is not JSON'):
        INaturalist(inat, True, 2018)


def test_cifar_stays_as_it_is_at_its_own_size():
    flags = ['--data-set', 'CIFAR', '--data-path', '.', '--aa', '', '--color-jitter', '0', '--reprob', '0']
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8))
    args = parse_args([*flags, '--input-size', '32'])
    result = build_transform(False, args)(picture) * 0.225
    expected = torch.tensor(np.asarray(picture) / 255).permute(2, 0, 1)[2] - 0.406
    torch.testing.assert_close(result[2], expected.float())
    shifted = {build_transform(True, args)(picture)[:, :, -1].sum().item() for _ in range(8)}
    assert len(shifted) > 1 and build_transform(True, args)(picture).shape == (3, 32, 32)
    assert build_transform(False, parse_args([*flags, '--input-size', '64']))(picture).shape == (3, 64, 64)


def test_validation_is_resize_and_centre_crop():
    pixels = np.random.RandomState(0).randint(0, 256, (60, 90, 3), dtype=np.uint8)
    result = build_transform(False, parse_args(['--data-path', '.', '--input-size', '56']))(Image.fromarray(pixels))
    resized = Image.fromarray(pixels).resize((96, 64), Image.BICUBIC)            # 64 = 256 / 224 · 56
    crop = np.asarray(resized)[4:60, 20:76] / 255
    expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(result.permute(1, 2, 0), expected, atol=1e-5)


def batches(num_workers, epoch):
    dataset = Digits(True, build_transform(True, parse_args(['--input-size', '32'])))
    sampler = TrainSampler(range(60), 1, 0, seed=3, repeated_aug=True)
    sampler.set_epoch(epoch)
    loader = DataLoader(SeededDataset(dataset), 20, sampler=sampler, num_workers=num_workers)
    torch.manual_seed(np.random.randint(1000))                                   # the state outside must not matter
    return [images for images, _ in loader]


def test_augmentation_is_a_function_of_seed_epoch_and_position():
    alone, two_workers, next_epoch = batches(0, 0), batches(2, 0), batches(0, 1)
    for a, b, c in zip(alone, two_workers, next_epoch, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    first, copy = alone[0][:2]                                                   # repeated augmentation: one picture
    assert not torch.equal(first, copy)
