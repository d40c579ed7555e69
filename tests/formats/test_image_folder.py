import os
import shutil

import pytest
import torchvision

import folder2lmdb
from datasets import build_dataset
from formats.image_folder import ImageFolder
from formats.lmdb_dataset import ImageFolderLMDB
from runtime.utils import InputError


@pytest.fixture
def tree(image_folder, tmp_path):
    """A copy of the image folder, with an image in a folder below its class."""
    shutil.copytree(image_folder, tmp_path / 'data')
    (tmp_path / 'data' / 'val' / 'red' / 'a').mkdir()
    (tmp_path / 'data' / 'val' / 'red' / '2.png').rename(tmp_path / 'data' / 'val' / 'red' / 'a' / '2.PNG')
    return tmp_path / 'data'


def images(tree):
    return [(os.path.relpath(path, tree), label) for path, label in ImageFolder(tree).samples]


def copy(path, *names):
    """Write copies of an image under other names; folders are made."""
    for name in names:
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, path.parent / name)


def test_the_images_of_torchvision(tree, capsys):
    (tree / 'elsewhere').mkdir()
    shutil.copy(tree / 'val' / 'red' / '0.png', tree / 'elsewhere' / '9.jpeg')
    (tree / 'val' / 'yellow').symlink_to(tree / 'elsewhere')                 # a class, and a folder in one, as links
    (tree / 'val' / 'green' / 'more').symlink_to('../../elsewhere')
    ours, theirs = ImageFolder(tree / 'val'), torchvision.datasets.ImageFolder(tree / 'val')
    assert ours.samples == theirs.samples and len(ours) == 11 and ours.classes == theirs.classes
    assert (ours.targets, ours.class_to_idx) == (theirs.targets, theirs.class_to_idx)
    assert capsys.readouterr().out == ''


def test_files_that_are_left_out(tree, tmp_path, capsys):
    """Their number and suffixes are said once, by every program that reads the tree."""
    before = images(tree / 'val')
    copy(tree / 'val' / 'red' / '0.png', 'b.jfif', 'c.JFIF', 'd.gif', 'README', '._0.png', '../0.png', '.DS_Store')
    assert images(tree / 'val') == before
    kinds = '2 .jfif', '1 .gif', '1 README', '1 ._*', '1 .png', '1 .DS_Store'
    printed = capsys.readouterr().out
    assert '7 files are left out' in printed and all(kind in printed for kind in kinds) and printed.count('\n') == 1
    build_dataset(False, data_set='IMNET', data_path=tree)
    assert capsys.readouterr().out == ''               # once in a process
    shutil.copytree(tree, tmp_path / 'other')
    folder2lmdb.convert(str(tmp_path / 'other' / 'val'), str(tmp_path / 'val.lmdb'))
    assert '7 files are left out' in capsys.readouterr().out
    assert [name for name, _ in ImageFolderLMDB(tmp_path / 'val.lmdb').samples] == [name for name, _ in before]


@pytest.mark.parametrize('name', ['.ipynb_checkpoints', '@eaDir', '.cache', '__MACOSX', 'lost+found'])
def test_hidden_folders(name, tree, capsys):
    before = images(tree / 'val')
    for place in '..', '.', 'a':
        copy(tree / 'val' / 'red' / '0.png', f'{place}/{name}/0.png')
    assert images(tree / 'val') == before and ImageFolder(tree / 'val').classes == ['blue', 'green', 'red']
    assert f'folders left out, as hidden, of the system, or links to a folder above: {name}' in capsys.readouterr().out


@pytest.mark.parametrize('link, target', [
    ('red/up', '..'), ('red/here', '.'), ('red/a/up', '../..'), ('loop', '.'), ('loop', '..'), ('red/data', '../..'),
    ('red/root', '/')])
def test_links_to_a_folder_above(link, target, tree, capsys):
    before = images(tree / 'val')
    (tree / 'val' / link).symlink_to(target)
    assert images(tree / 'val') == before
    assert f'links to a folder above: {link.split("/")[-1]}' in capsys.readouterr().out


def test_links_to_one_another(tree):
    (tree / 'val' / 'red' / 'x').symlink_to('../blue')
    (tree / 'val' / 'blue' / 'y').symlink_to('../red')
    assert len(images(tree / 'val')) == 9 + 3 + 3      # each has the other's, once


def test_classes_reached_by_a_link(tree, tmp_path):
    """A link in them that leads back to the split by another path."""
    (tree / 'val' / 'red').rename(tmp_path / 'red')
    (tree / 'val' / 'red').symlink_to(tmp_path / 'red')
    before = images(tree / 'val')
    (tmp_path / 'red' / 'back').symlink_to(tree / 'val')
    assert images(tree / 'val') == before and len(before) == 9


def test_root_in_a_hidden_folder_or_by_a_link(tree, tmp_path):
    before = images(tree / 'val')
    (tmp_path / '.cache').mkdir()
    tree.rename(tmp_path / '.cache' / '@eaDir')
    (tmp_path / 'link').symlink_to(tmp_path / '.cache' / '@eaDir' / 'val')
    assert images(tmp_path / '.cache' / '@eaDir' / 'val') == images(tmp_path / 'link') == before


def test_class_without_images(tree):
    (tree / 'val' / 'empty').mkdir()
    with pytest.raises(InputError, match=r'val/empty has no image; names end in \.jpg'):
        ImageFolder(tree / 'val')
    shutil.rmtree(tree / 'val')
    (tree / 'val' / '.hidden').mkdir(parents=True)
    with pytest.raises(InputError, match='val has no folders of classes; .*<class>/<image> is expected'):
        ImageFolder(tree / 'val')
