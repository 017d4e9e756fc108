"""What is predicted on the meta device is what the meter counts when the same thing runs."""

import pytest
import torch

from experiments.accounting import predict
from lora import add_logit_bias, add_lora
from qwen_min import FlopMeter
from qwen_min.generate import decode, left_padded, prefill
from qwen_min.loss import continuation_losses


def test_a_batch_run_in_groups_costs_what_the_whole_costs(random_model):
    model = random_model()
    ids = torch.ones(4, 6, dtype=torch.int64)
    with FlopMeter() as whole:
        model.loss(ids, ids)
    with FlopMeter() as parts:
        for row in ids.split(1):
            model.loss(row, row)
    assert parts.by_component() == whole.by_component()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("logit_bias", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("scored", [0, 1, 7])
@pytest.mark.parametrize("new", [0, 1, 2, 9])
def test_samples_and_a_scored_continuation_cost_what_was_predicted(
    random_model, rank, logit_bias, samples, scored, new
):
    model = random_model()
    if logit_bias:
        add_logit_bias(model)
    if rank:
        add_lora(model, rank)
    ids, padding = left_padded([[1, 2, 3], [4, 5, 6, 7, 8]])
    with FlopMeter() as meter:
        if new or scored:
            read = prefill(model, ids, 8, padding)
        if scored:
            continuation_losses(model, read, torch.ones(2, scored, dtype=torch.int64))
        if new:
            list(decode(model, read, new, samples=samples, repetition_penalty=1.1))
    options = {"rank": rank, "logit_bias": logit_bias, "samples": samples, "scored": scored}
    assert meter.total == predict.generation(model.config, 2, 5, new, **options)
