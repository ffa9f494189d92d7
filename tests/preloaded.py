"""What every run imports, in the server that runs are forked from: half of the time of a run of a tiny model."""

import gc

import matplotlib.figure  # noqa: F401
import sacrebleu  # noqa: F401
import sentence_transformers  # noqa: F401
import sklearn.linear_model  # noqa: F401
import tensorboard  # noqa: F401

import unlearn_ds.trainer  # noqa: F401

gc.freeze()  # or every run would copy what it shares with the server as soon as it looks for garbage
