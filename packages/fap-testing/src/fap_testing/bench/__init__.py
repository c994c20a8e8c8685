"""Measure attention implementations side by side, each result checked: the command ``fap-bench``.

The command line needs ``pip install "fap-testing[bench]"``; the modules below it need torch alone.
"""
