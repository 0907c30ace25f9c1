"""A stack of layers over stages of devices: what each works on at each tick, and the program that does it.

Imports logical axes; must not depend on blocks, or on what a row is made of.
"""
