"""How long a training step takes: the work of each op against what the GPU can do.

`work` counts matrix products, attention, traffic and kernels of one step from the played program; `roofline` turns
them into seconds with constants fitted on measured steps; `model` adds them up; `fit` makes the constants.
"""
