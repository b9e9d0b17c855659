"""How fast the system is, beside PyTorch's own, transformers and diffusers."""
