"""Runs that are broken on purpose: one file a kind of fault, and the case that breaks, restarts and checks a run.

Knows the command line, exit codes and files of a run; must not know how the loop works.
"""
