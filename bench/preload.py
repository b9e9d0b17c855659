"""Imported once by the server from which the groups' processes are forked, so that none of them waits for the libraries.

A library that is missing, or breaks when it is imported, costs the cells of its peers and nothing else. None may
start CUDA here: processes.py sees to that.
"""

import importlib

LIBRARIES = (
    "bench.groups",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
    "diffusers.models.transformers.transformer_cosmos",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
)

for name in LIBRARIES:
    try:
        importlib.import_module(name)
    except Exception:  # its peers import it again, and say what is wrong
        pass
