"""What the keys of one method need of other sections of the config, a file for each method; `checks` calls them.

Knows the whole config; must not know the program that it makes, nor devices.
"""
