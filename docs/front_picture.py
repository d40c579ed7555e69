"""Draw the picture at the top of README: what a DINOv2 keeps of a photograph, and what it merges.

    python docs/front_picture.py images/photograph.png [WEIGHTS.pth]

The photograph is scikit-learn's. The weights are timm's, or a state dict of vit_small_patch14_dinov2.
"""
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evit.observation import observe
from evit.pictures import contact_sheet, denormalize, stage_images, to_bytes
from models_evit import to_evit
from runtime.checkpoint import load_finetune


def main(path, weights=None):
    torch.manual_seed(0)
    model = timm.create_model('vit_small_patch14_dinov2', pretrained=weights is None, img_size=336, num_classes=0)
    if weights:
        load_finetune(model, weights)
    photograph = torch.from_numpy(load_sample_image('flower.jpg').copy()).permute(2, 0, 1)[None, :, :, 90:517] / 255
    images = normalize(F.interpolate(photograph, (336, 336), mode='bicubic', antialias=True).clamp(0, 1),
                       IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    rows = []
    for way in ('drop', 'merge'):
        seen = observe(to_evit(model, 0.5, drop_loc=(3, 6, 9), way=way), images)
        pictures = stage_images(images, seen, model.patch_embed.patch_size)
        rows.append(to_bytes(torch.cat([denormalize(images)[None], pictures], dim=1))[0])
    contact_sheet(rows, ['photograph', 'block 3', 'block 6', 'block 9'],
                  [('drop: the patches that remain',), ('merge: patches that became one have one colour',)]).save(path)


if __name__ == '__main__':
    main(*sys.argv[1:])
