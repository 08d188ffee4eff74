"""Gates inside a model: attaching them, deciding with them, and executing only what they let run.

One hidden state's way through a gated layer, in the order to read it:

1. `call.py`: what the layers know during a call, and what is decided and recorded in it. `running.py` builds one per
   forward of the model, before any layer runs.
2. `layer.py`: the states enter a layer, which has itself, or a part, executed; at a decision point, the call's policy
   is asked first, and what it says of the layers up to the next point is kept in `stretch.py`.
3. `gates.py`: a linear score per token.
4. `policies.py`: the score against a threshold, or a fixed table: which tokens run. A threshold of each row's own, at
   which its prompt spends a budget, is found in `spending.py`, by what `costs.py` reads off the layers.
5. `execute.py`: masked, gathered or dense; the layer's own `forward` is called here.
6. `stand_ins.py`: what that `forward` meets in the cache's place.
7. `attention.py`: packed tokens become rows again for attention alone, where `layout.py` says.
8. `cache.py`: where keys and values stay, with the index of each's token; `room.py` has memory to spare.

`lossless.py` has the gated model draft tokens that the dense one verifies; `generation.py` is how a caller asks for it.
`compiled.py` has steps 5 to 7 once more, for layers that `compile` makes graphs of; `recorded.py` replays them.

Beside it stand `modality.py` (the two kinds of tokens), `views.py` (a layer with other parts inside),
`measured.py` (which of two ways to run one is faster here), `eviction.py` (how gates learn what their eviction costs
others) and `subclass.py` (how a live module gets all this).
"""

from .attach import attach, compile, detach, find_router, gate_state, gated_layers, set_gates
from .cache import SkipCache
from .call import Policy, Step, Trace
from .config import RouterConfig
from .drafts import Drafts
from .errors import (
    CheckpointError,
    DecoderNotFoundError,
    InputError,
    RouterConfigError,
    SkipItError,
    UnsupportedModelError,
)
from .modality import MODALITIES, TEXT, VISION, token_modality
from .policies import FixedUnits, Gated, LayerByLayer
from .running import Router, running
from .stretch import Decision

__all__ = [
    "MODALITIES",
    "TEXT",
    "VISION",
    "CheckpointError",
    "Decision",
    "DecoderNotFoundError",
    "Drafts",
    "FixedUnits",
    "Gated",
    "InputError",
    "LayerByLayer",
    "Policy",
    "Router",
    "RouterConfig",
    "RouterConfigError",
    "SkipCache",
    "SkipItError",
    "Step",
    "Trace",
    "UnsupportedModelError",
    "attach",
    "compile",
    "detach",
    "find_router",
    "gate_state",
    "gated_layers",
    "running",
    "set_gates",
    "token_modality",
]
