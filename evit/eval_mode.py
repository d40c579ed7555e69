"""Models in eval mode for a while."""
import contextlib


@contextlib.contextmanager
def eval_mode(*models):
    """Put models into eval mode, and restore the mode of each module on exit."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
