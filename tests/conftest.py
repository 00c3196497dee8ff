"""Settings of the whole suite, made before anything imports torch."""

import os

# One thread: the tensors are small, results do not depend on the machine's cores, and tests that fork processes
# (`debug_launcher`) cannot inherit an OpenMP pool whose threads are gone in the child, where it would wait for ever.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
