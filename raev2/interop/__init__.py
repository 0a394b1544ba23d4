"""Weights of RAE and RAEv2 in and out.

generator = import_generator(state_dict, config)    # DiTwDDTHead, DiTwDDTHeadIG, LightningDiT, LightningDiTIG
decoder = import_decoder(state_dict, config)        # GeneralDecoder: latent tokens (B, N, D) -> images (B, 3, H, W)
state_dict = export_generator(generator)            # back to the reference's names

`raev2 import` and `raev2 export` do the same for files, and for whole tokenizers of diffusers.
"""

from raev2.interop.generators import export_generator, generator_config, import_generator
from raev2.interop.tokenizers import (
    export_decoder,
    export_discriminator,
    export_stats,
    import_decoder,
    import_discriminator,
    import_stats,
)
from raev2.tokenizer.encoders import aggregate_layers

__all__ = [
    "aggregate_layers",
    "export_decoder",
    "export_discriminator",
    "export_generator",
    "export_stats",
    "generator_config",
    "import_decoder",
    "import_discriminator",
    "import_generator",
    "import_stats",
]
