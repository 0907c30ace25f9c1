"""Where a run is kept: a folder of a disk, or of an object store (gs://, s3://), behind one small interface.

Knows files and objects; must not know what is in them, or which process writes them.
"""
