"""One micro-batch through a pipeline stage, as torch's engine runs it. Apart from `trace`, because importing torch's
pipelines takes a tenth of a second, which a model in one piece has no use for.
"""

from __future__ import annotations

from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight

from trainer.estimate.tracker import StorageTracker
from trainer.estimate.units import Feed, Shape, Unit, groups_of


def run_stage(unit: Unit, feed: Feed, shape: Shape, tracker: StorageTracker, *, split: bool) -> None:
    """Run a micro-batch as torch's pipeline engine does: it keeps the output until the stage's backward is done.
    split: the gradient of the input first, that of the weights afterwards."""
    assert unit.stage is not None
    output = unit.module(feed.inputs, targets=feed.labels, **feed.extras)
    tracker.mark("forward_exit root")
    result = output
    values = [feed.inputs, *feed.extras.values()]
    if not split:
        tracker.mark("backward")
        tracker.mark("backward_enter root")
        sent = stage_backward(result, feed.received, values)
        del sent
        return
    tracker.mark("input")
    tracker.mark("backward_enter root")
    given = None if feed.received is None else [feed.received]
    sent, groups = stage_backward_input([result], given, values, unit.module.parameters())
    feed.inputs.grad = None
    output.detach_()
    del output, result, sent
    tracker.mark("weights")
    grouped, waiting = groups_of(unit), dict(unit.module.named_parameters())
    names = {id(parameter): name for name, parameter in waiting.items()}
    for group in groups:
        group_name = next(grouped[names[id(node.variable)]][0] for node in group["params"])
        tracker.mark(f"weights_of {group_name if group_name.isdigit() else 'end'}")
        stage_backward_weight(unit.module.parameters(), [group])
        for name in [name for name, parameter in waiting.items() if parameter.grad is not None]:
            del waiting[name]
            tracker.mark(f"gradient {name}")
