"""What is looked at before a run, one subject a file. The checks are rows of ``registry.py``.

Nothing here imports torch but where devices or process groups are asked: a node must answer within seconds.
"""
