"""What a run writes about itself: metrics, timeline, goodput, progress, plots.

Knows numbers and files; must not know what the numbers mean.
"""
