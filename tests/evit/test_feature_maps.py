"""timm's `features_only`."""
import pytest
import timm
import torch

from models_evit import VARIANTS


@pytest.mark.parametrize('name', VARIANTS)
def test_features_only(name):
    """Through timm's own `features_only`, for each registered name: the maps of the whole model's blocks."""
    torch.manual_seed(0)
    options = dict(img_size=32, embed_dim=32, num_heads=2, depth=4)
    model = timm.create_model(name, features_only=True, **options).eval()
    whole = timm.create_model(name, **options).eval()
    missing, unexpected = whole.load_state_dict(model.model.state_dict(), strict=False)
    assert not unexpected and not any(key.startswith('blocks') for key in missing)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model(images)
        assert [tuple(one.shape) for one in features] == len(features) * [(2, 32, 2, 2)] and len(features) == 3
        for one, other in zip(features, whole.forward_intermediates(images, 3, intermediates_only=True), strict=True):
            assert torch.equal(one, other)
    assert model.feature_info.channels() == [32, 32, 32]
    chosen = timm.create_model(name, features_only=True, out_indices=(1,), **options)
    assert len(chosen(images)) == 1 and len(chosen.model.blocks) == 2
