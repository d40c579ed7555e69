"""The criterion: cross entropy, the distillation loss of DeiT (arXiv:2012.12877), the token loss of LV-ViT."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy


def build_base_criterion(smoothing, soft_labels):
    """Cross entropy (logits (B, C), labels) → scalar, for soft labels (B, C) or class labels (B,) to be smoothed."""
    if soft_labels:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """A criterion for the class head, combined with the distillation of a teacher into the distillation head.

    Args:
        base_criterion: (logits, labels) → loss of the class head.
        teacher: model, images → logits; unused if `distillation_type` is 'none'.
        distillation_type: 'none'; 'soft', the KL divergence at temperature `tau`, averaged over batch and classes;
            'hard', the cross entropy with the class that the teacher predicts.
        alpha: weight of the distillation loss; the base criterion has 1 − alpha.
        tau: temperature of 'soft'.
    """

    def __init__(self, base_criterion, teacher=None, distillation_type='none', alpha=0.5, tau=1.0):
        super().__init__()
        self.base_criterion = base_criterion
        self.teacher = teacher
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau

    def forward(self, images, outputs, labels):
        """→ scalar.

        Args:
            images: (B, 3, H, W), for the teacher.
            outputs: logits (B, C) of the class head and of the distillation head, or of the class head alone.
            labels: as `base_criterion` takes them.
        """
        outputs, outputs_kd = outputs if isinstance(outputs, tuple) else (outputs, None)
        base_loss = self.base_criterion(outputs, labels)
        if self.distillation_type == 'none':
            return base_loss
        with torch.no_grad():
            teacher_outputs = self.teacher(images)
        if self.distillation_type == 'soft':
            distillation_loss = self.tau ** 2 / outputs_kd.numel() * F.kl_div(
                F.log_softmax(outputs_kd / self.tau, dim=1), F.log_softmax(teacher_outputs / self.tau, dim=1),
                reduction='sum', log_target=True)
        else:
            distillation_loss = F.cross_entropy(outputs_kd, teacher_outputs.argmax(dim=1))
        return base_loss * (1 - self.alpha) + distillation_loss * self.alpha


class TokenLabelingLoss(nn.Module):
    """Cross entropy of the class token, plus `dense_weight` times the mean of that of the patch tokens (LV-ViT, §3.2).

    Only patches that remain have a part in it, and no fused token.
    """

    def __init__(self, dense_weight=0.5):
        super().__init__()
        self.dense_weight = dense_weight

    def forward(self, images, outputs, targets):
        """→ scalar.

        Args:
            images: not used.
            outputs: of `EViTLVViT.forward` with `mixed`: logits (B, K) and (B, n, K), patches (B, n).
            targets: `token_labels.Targets`, of images (B, K) and of patches (B, N, K).
        """
        logits, token_logits, patches = outputs
        num_patches = targets.patches.shape[1]
        rows = patches.clamp(max=num_patches - 1).unsqueeze(-1).expand_as(token_logits)
        token_targets = targets.patches.gather(1, rows)                                # (B, n, K)
        token_losses = F.cross_entropy(token_logits.flatten(0, 1), token_targets.flatten(0, 1), reduction='none')
        is_patch = (patches < num_patches).flatten()
        token_loss = (token_losses * is_patch).sum() / is_patch.sum().clamp(min=1)
        return F.cross_entropy(logits, targets.images) + self.dense_weight * token_loss
