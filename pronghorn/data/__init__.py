"""Problems and their answers: GSM8K, synthetic arithmetic, chat helpers.

A leaf package: it imports nothing of Pronghorn but `config`.
"""
