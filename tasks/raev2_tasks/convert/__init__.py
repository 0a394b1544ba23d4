"""`raev2 import` and `raev2 export`: files of RAE, RAEv2 and diffusers in and out."""
