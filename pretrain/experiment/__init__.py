"""The whole config: facts that span its sections, its phases, what a resume may change, the program it makes, and how
its objective reads a prompt.

Knows the config sections of every folder below; must not know the loop, nor hold arrays.
"""
