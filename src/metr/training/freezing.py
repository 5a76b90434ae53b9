"""Parts that keep their weights, and how deep each part lies: stem, backbone stages, encoder, all that follows it."""

from torch import nn

from metr.errors import ModelError
from metr.training.config import Freeze

BACKBONE, ENCODER = "backbone", "encoder"


def freeze(network: nn.Module, what: Freeze) -> tuple[nn.Module, ...]:
    """Takes parts of a detector out of training, and gives them.

    Their parameters need no gradient, and they are in evaluation mode; whoever calls `network.train()` puts them back
    into it, so that no batch statistic moves.

    Args:
        network: With submodules `backbone` and `encoder`, as far as they are to be frozen.
        what: "none"; "half", the stem and the first half of the backbone's stages; "backbone"; or "encoder", which is
            backbone and encoder.

    Raises:
        ModelError: the network has no such part, or the backbone's stages cannot be told apart.
    """
    frozen = _parts(network, what)
    for module in frozen:
        module.requires_grad_(False)
        module.eval()
    return frozen


def backbone_stages(backbone: nn.Module) -> tuple[tuple[nn.Module, ...], ...]:
    """The modules of a backbone by stage: the stem (all that comes before the stages), then each stage.

    The stages are the outermost list of modules that holds most weights; what comes after it counts as the last stage.
    A backbone without such a list is one stage.
    """
    lists = {
        path: module
        for path, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    if not lists:
        return ((backbone,),)
    path = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].state_dict().values()))
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    parent = backbone
    for step in path.split("."):
        names, children = zip(*parent.named_children(), strict=True)
        place = names.index(step)
        before += children[:place]
        after += children[place + 1 :]
        parent = children[place]
    stages = [(stage,) for stage in parent.children()]
    return (tuple(before), *stages[:-1], (*stages[-1], *after))


def depths_below_top(network: nn.Module) -> dict[int, int]:
    """How far below the top each parameter of backbone and encoder lies, by its `id`.

    The encoder lies 1 below what follows it (which is not listed), the backbone's last stage 2, its stem deepest.
    """
    depths: dict[int, int] = {}
    children = dict(network.named_children())
    if ENCODER in children:
        depths |= {id(parameter): 1 for parameter in children[ENCODER].parameters()}
    if BACKBONE in children:
        stages = backbone_stages(children[BACKBONE])
        # parameters that lie in no module of a stage are those of the backbone's outermost shell
        depths |= {id(parameter): len(stages) + 1 for parameter in children[BACKBONE].parameters()}
        for depth, stage in enumerate(reversed(stages), 2):
            depths |= {id(parameter): depth for module in stage for parameter in module.parameters()}
    return depths


def _parts(network: nn.Module, what: Freeze) -> tuple[nn.Module, ...]:
    if what == "none":
        return ()
    children = dict(network.named_children())
    names = (BACKBONE, ENCODER) if what == "encoder" else (BACKBONE,)
    for name in names:
        if name not in children:
            raise ModelError(f"the network has no {name} to freeze", where="train.freeze", hint="train.freeze=none")
    if what != "half":
        return tuple(children[name] for name in names)
    stages = backbone_stages(children[BACKBONE])
    if len(stages) < 3:
        what_failed = "cannot tell the stages of this backbone apart"
        raise ModelError(what_failed, where="train.freeze", hint="freeze the whole backbone, or none")
    # the stem, then half of the stages, rounded down: up to stride 8 in the usual backbones
    first = stages[: 1 + (len(stages) - 1) // 2]
    return tuple(module for stage in first for module in stage)
