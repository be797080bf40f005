import torch

from spar_d2.distillation.match_inputs import match


def batch(*sizes):
    """Input and output of an encoder with patch 16; each image is filled with its number."""
    images = torch.stack([torch.full((3, *size), float(number)) for number, size in sizes])
    return images, torch.zeros(len(sizes), 4, 2, 2)


def record(name, size):
    return {"file_name": name, "image": torch.zeros(3, *size), "position": ord(name)}


def test_one_batch_is_in_the_order_of_the_inputs_at_any_size():
    encoded = match([batch((0, (64, 96)), (1, (64, 96)))], [record("a", (60, 90)), record("b", (64, 96))])
    assert [one.name for one in encoded] == ["a", "b"]
    assert [one.position for one in encoded] == [ord("a"), ord("b")]
    assert [one.image[0, 0, 0].item() for one in encoded] == [0, 1]


def test_several_batches_are_matched_by_size():
    inputs = [record("a", (64, 96)), record("b", (32, 32)), record("c", (64, 96))]
    encoded = match([batch((0, (64, 96)), (2, (64, 96))), batch((1, (32, 32)))], inputs)
    assert [one.name for one in encoded] == ["a", "c", "b"]


def test_ambiguous_inputs_are_named_together():
    inputs = [record("a", (64, 96)), record("b", (64, 96))]
    for encoded in (match([batch((0, (64, 96)))], inputs), match([batch((0, (8, 8))), batch((1, (8, 8)))], inputs)):
        assert {one.name for one in encoded} == {"a or b"}
        assert {one.position for one in encoded} == {None}
    (alone,) = match([batch((0, (8, 8)))], torch.zeros(1, 3, 8, 8))
    assert alone.name == "an unnamed image"
