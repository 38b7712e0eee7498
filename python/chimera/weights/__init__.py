"""Weights on the host: every model's tensors once, in the layout its engine keeps them in, shared by all processes.

    source     the files of a checkpoint: their identity, and whether they are what their headers say
    image      one model's tensors in one file: bytes first, a table of contents last
    store      the folder of images: who may build, what must go, who uses what
    copier     the way from an image into a device
    site       where it lies there: addresses that stay while the bytes come and go

Knows bytes, names and files. What the tensors mean is the engine's, which builds the images.
"""
