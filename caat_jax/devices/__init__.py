"""What a program runs on: the mesh and the table of logical axes, processes, chips, topologies.

`config` comes before it; everything after may import it.
"""
