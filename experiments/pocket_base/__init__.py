"""How the pocket base is made: tokenizer, training data, two training stages, evaluation and plot.

`vismem pocket build` and `vismem pocket evaluate` run it. The package itself only loads the result.
"""
