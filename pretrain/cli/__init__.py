"""The command line: one file a command, which parses flags and calls one function below.

Imports every folder below; nothing imports it.
"""
