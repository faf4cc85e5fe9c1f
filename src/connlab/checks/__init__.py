"""Checks of the labs: they run the learner's functions on real servers, and say what was expected and measured.

``trial`` says how a check is written; each lab has a module of its own here, with the checks that it calls.
"""
