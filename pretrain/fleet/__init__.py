"""Starting processes, and restarting them when they fail.

Knows exit codes, the timeline and the incident log; must not know the experiment or what a process computes.
"""
