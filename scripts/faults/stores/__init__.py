"""Runs in an object store that refuses, loses answers, or belongs to another run; and the store.

Knows the command line, exit codes and files of a run; an object store; must not know how the loop works.
"""
