"""The whole config: checks that span its sections, its phases, what a resumed run may change, the program it makes.

Imports the config sections of every folder below; must not import the loop, nor hold arrays.
"""
