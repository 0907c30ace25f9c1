"""Where a token is: rotary angles, biases of distances, position vectors.

Imports norms and parameter descriptions; must not depend on attention, which uses them.
"""
