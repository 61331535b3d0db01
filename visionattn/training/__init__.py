"""Training of image classifiers: configuration, data, optimisation, the loop, and prediction with the result.

`tools/train.py` and `tools/predict.py` are the command lines of `loop.train` and `prediction.classify`.
Needs the extra `train` (accelerate, albumentations, omegaconf, rich, matplotlib, scikit-learn).
"""
