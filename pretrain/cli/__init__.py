"""The words of the command line: one file a command, which parses flags and calls one function below.

Knows every folder below; nothing imports it.
"""
