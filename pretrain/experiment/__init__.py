"""The whole config: facts that span its sections, its phases, what a resume may change, and the program it makes.

Knows the config sections of every folder below; must not know the loop, nor hold arrays.
"""
