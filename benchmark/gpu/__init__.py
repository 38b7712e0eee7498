"""What only a GPU can tell: the spike that settles open choices of the design, and the kit that takes SGLang to a GPU."""
