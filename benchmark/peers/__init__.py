"""Others that serve many models, under the same requests: started where PyPI can install them, by their URL otherwise."""
