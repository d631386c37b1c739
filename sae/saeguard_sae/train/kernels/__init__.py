"""The sparse arithmetic of a training step, in C++ for CPUs and in torch for everything; both give the same results.

A step's cost beyond the one dense product that proposes features is that of the pairs (token, feature) which fire.
"""
