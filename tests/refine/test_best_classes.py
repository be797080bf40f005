"""The best class of every pixel from chunks of classes is that of all scores at once."""

import pytest
import torch

from spar_d2.refine import PixelGraph, best_classes, lposs_plus

SCORES = torch.randn(11, 6, 7, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("chunk", [1, 4, 11])
@pytest.mark.parametrize("prob_threshold", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("removed", [None, [0, 3], range(11)])
def test_chunks_give_what_all_classes_give(chunk, prob_threshold, removed):
    allowed = None if removed is None else torch.ones(11, dtype=torch.bool).index_fill_(0, torch.tensor(removed), False)
    best, weak = best_classes(SCORES.split(chunk), 20.0, prob_threshold, allowed)
    kept = SCORES if allowed is None else SCORES.masked_fill(~allowed[:, None, None], -torch.inf)
    assert best.dtype == torch.int64 and torch.equal(best, kept.argmax(0))
    if not prob_threshold:
        assert not len(weak)
        return
    probability = (20 * SCORES.double()).softmax(0).gather(0, best[None])[0]
    if removed == range(11):
        probability = torch.zeros(6, 7)
    assert torch.equal(weak, probability < prob_threshold)
    assert removed == range(11) or prob_threshold != 0.3 or 0 < weak.float().mean() < 1


def test_ties_go_to_the_first_class():
    best, _ = best_classes(torch.ones(6, 2, 3).split(2))
    assert not best.any()


def test_probabilities_of_large_scores_do_not_overflow():
    scores = torch.tensor([1e4, -1e4, 1e4]).view(3, 1, 1)
    assert best_classes(scores.split(1), 40.0, 0.49)[1].tolist() == [[False]]
    assert best_classes(scores.split(1), 40.0, 0.51)[1].tolist() == [[True]]


def test_propagated_chunks_give_the_labels_of_all_classes():
    image = 0.3 + 0.4 * torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(1))
    graph, refined = PixelGraph(image), lposs_plus(SCORES, image)
    best, weak = best_classes((graph.propagate(part) for part in SCORES.split(3)), prob_threshold=0.5)
    assert torch.equal(best, refined.argmax(0))
    assert (weak == ((40 * refined).softmax(0).amax(0) < 0.5)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "parts must have scores of at least one class"),
        (([SCORES[:0]],), "parts must have scores of at least one class"),
        (([SCORES[0]],), r"parts must be scores \(C, H, W\), got \(6, 7\)"),
        (([SCORES], 0.0), "logit_scale must be above 0, got 0.0"),
        (([SCORES], 40.0, 1.5), r"prob_threshold must be in 0..1, got 1.5"),
        (([SCORES], 40.0, 0.1, torch.ones(10, dtype=torch.bool)), "allowed .* got 10 for 11"),
        (([SCORES], 40.0, 0.1, torch.ones(12, dtype=torch.bool)), "allowed .* got 12 for 11"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        best_classes(*arguments)
