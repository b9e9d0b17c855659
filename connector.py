"""The connector: what the diffusion transformer is told by the language model.

Every decoder layer's hidden state of a token is normalised by itself, all layers are laid side by side, and one linear layer
with a GELU turns that into the vectors which each block of the DiT attends to (Cosmos-Predict2.5, section on the text encoder;
28 layers x 3584 = 100352 -> 1024 for Qwen2.5-VL-7B). In a checkpoint its weights live in the DiT as `crossattn_proj`.

    hidden = mllm(ids, positions, cu_seqlens)         # L tensors (N, H)
    context = dit.crossattn_proj(features(hidden))    # (N, text_embed_dim), all that a decoder has to keep
"""

import torch
from torch import Tensor, nn

from ops import standardise_into


def features(hidden: list[Tensor]) -> Tensor:
    """L hidden states (N, H) -> (N, L * H), same dtype: per token and layer (h - mean) / (std + 1e-8), std unbiased, in fp32.

    Mean and std run over the H channels of one token in one layer. Without gradients each layer is written straight into its
    slice of the result: at full size that is 200 KB per token, and stacking would double it.
    """
    tokens, width = hidden[0].shape
    dtype = hidden[0].dtype

    # With gradients: autograd needs every step as a tensor of its own.
    if torch.is_grad_enabled() and any(h.requires_grad for h in hidden):
        normed = []
        for h in hidden:
            std, mean = torch.std_mean(h.float(), -1, correction=1, keepdim=True)           # (N, 1) each
            normed.append(((h - mean) / (std + 1e-8)).to(dtype))                            # (N, H)
        return torch.cat(normed, -1)                                                        # (N, L * H)

    # Without: the result is all that is allocated.
    out = hidden[0].new_empty(tokens, len(hidden) * width)                                  # (N, L * H)
    for part, h in zip(out.split(width, 1), hidden, strict=True):
        standardise_into(part, h)
    return out


class Connector(nn.Sequential):
    """Linear with bias and exact GELU, (N, L * H) -> (N, text_embed_dim); parameters "0.weight" and "0.bias".

    Zero features are the null condition of Cosmos' training (text dropout): they give gelu(bias).
    """

    def __init__(self, in_features: int, out_features: int):
        # A sequence, because its parameters are named by number in the published file.
        super().__init__(nn.Linear(in_features, out_features), nn.GELU())
