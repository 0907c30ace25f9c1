"""The run: from a command line to a trained model.

Its folders are layers: each imports only those below it (setup.cfg).
"""
