"""Metrics as pure functions of numpy arrays and strings. Import the module that is needed:

`captioning` (CIDEr-D, exact match, word accuracies), `classification` (top-k accuracy, average precision, OVAD),
`calibration` (expected calibration error, Platt scaling), `detection` (dense-captioning mAP, COCO recognition),
`vqa` (ANLS, VQA accuracy, multiple choice), `segmentation` (mean IoU).
"""
