"""What processes of a run exchange outside of collectives: barriers, answers; the watchdog; skipped examples.

Knows the coordination service and the timeline; must not know what a step computes.
"""
