"""Panoptic quality. Only ``PanopticEvaluator`` needs Detectron2."""


def __getattr__(name: str):
    if name == "PanopticEvaluator":
        from spar_d2.evaluation.panoptic.evaluator import PanopticEvaluator

        return PanopticEvaluator
    raise AttributeError(f"module 'spar_d2.evaluation.panoptic' has no attribute '{name}'")
