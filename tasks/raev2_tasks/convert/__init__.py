"""`raev2 import` and `raev2 export`: weights of other implementations in and out, by the core's interop."""
