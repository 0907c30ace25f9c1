"""How tokens get to their experts and back: which have a place, on which device, and what a router did.

Imports remat's names, activations and logical axes; must not depend on the layer that has the parameters.
"""
