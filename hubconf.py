"""The registered models for torch.hub: torch.hub.load('.', 'deit_small_patch16_shrink_base', source='local')."""
dependencies = ['torch', 'torchvision', 'timm']

import models_evit                                     # noqa: E402

globals().update({name: getattr(models_evit, name) for name in models_evit.VARIANTS})
