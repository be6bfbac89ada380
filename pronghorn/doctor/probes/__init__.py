"""Small programs that try one thing each in a process of its own and print one line of JSON.

A probe that crashes, hangs or spoils the CUDA context takes only itself down.
"""
