"""Whole training steps: the models, the contenders that train them, the named cases.

A model says what it looks up and what it computes of that, once: `Model.loss` is
written with the functions of `Functions`, which JAX and torch both have. So all
contenders compute the same loss.
"""
