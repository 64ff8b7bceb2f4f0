"""One module per experiment: a frozen ``Config`` and ``run(config)``.

The same name is used for the module here, for its notebook in ``book/training`` and for its folder in ``results``.
"""
