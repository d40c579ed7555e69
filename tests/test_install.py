import os
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

USE = """
import sys

import datasets, utils                                 # of the folder, as somebody else's project has them
assert datasets.name == utils.name == 'theirs'
import timm
import torch
from models_evit import to_evit
from evit.observation import kept_patches
from evit.pictures import draw_sheets, mask_images

model = to_evit(timm.create_model('deit_tiny_patch16_224', depth=4, embed_dim=48, num_heads=2), fuse_token=True).eval()
images = torch.randn(2, 3, 224, 224)
assert model(images).shape == (2, 1000)
assert timm.create_model('deit_tiny_patch16_shrink_base', depth=4).token_settings.base_keep_rate == 0.7
pictures = mask_images(images, kept_patches(model, images), model.patch_embed.patch_size)
assert pictures.shape == (2, 3, 3, 224, 224)
grid, attention = draw_sheets(model, [(images, torch.tensor([0, 1]))], list(map(str, range(1000))))
assert grid.width > 400
ours = {name for name, module in sys.modules.items()
        if (getattr(module, '__file__', None) or '').startswith(sys.argv[1])}
assert {name.split('.')[0] for name in ours} == {'models_evit', 'evit'}, ours
print('done')
"""


@pytest.fixture
def project(tmp_path):
    """Somebody's folder with modules of common names; → the folder."""
    folder = tmp_path / 'project'
    folder.mkdir()
    for name in ('utils', 'datasets', 'engine', 'runtime'):
        (folder / f'{name}.py').write_text("name = 'theirs'")
    return folder


def test_installed_method(project, tmp_path):
    """pip puts the method into site-packages, and a project that has other modules of our names uses it."""
    source, site = tmp_path / 'source', tmp_path / 'site'
    # A copy, as pip writes into the folder
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns('.git', 'runs', 'tests', 'images'))
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation',
                    '--disable-pip-version-check', '--target', site, source], check=True)
    assert {path.name.split('-')[0] for path in site.iterdir()} - {'__pycache__'} == {'models_evit.py', 'evit'}
    (project / 'use.py').write_text(USE)
    done = subprocess.run([sys.executable, 'use.py', str(site)], cwd=project, capture_output=True, text=True,
                          env={**os.environ, 'PYTHONPATH': str(site)})
    assert done.stdout == 'done\n', done.stderr


def test_notebook_beside_other_modules_of_our_names(project):
    """What notebooks import from visualize_mask needs none of the names that other packages have, too."""
    program = (f'import datasets, utils, sys; sys.path.insert(0, {str(ROOT)!r})\n'
               'from visualize_mask import draw_sheets, kept_patches, mask_images, observe\n'
               'assert datasets.name == utils.name == "theirs"')
    (project / 'runtime.py').unlink()                  # of the repository
    subprocess.run([sys.executable, '-c', program], cwd=project, check=True)
