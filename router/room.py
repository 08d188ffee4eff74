"""Memory for keys or values with space to spare, so that a decoding step does not copy what is held."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

WORTH_A_ROOM = 2**16  # numbers in the keys, or values, of a layer
SPARE = 32  # tokens of room that a layer makes when it is extended: so many decoding steps without a copy


@dataclass
class Room:
    """Memory for keys or values with space to spare, of which the first `used` slots are taken.

    Whoever holds its end may go on in place, and one who shares it with no copy may crop it in place, too; others make
    room of their own, so that no layer writes over what another still reads.
    """

    memory: Float[Tensor, "batch heads room dim"]
    used: int
    shared: bool = False

    def ends(self, held: Float[Tensor, "batch heads slots dim"]) -> bool:
        """Whether what is held is all that there is: not what was selected, repeated, moved or copied."""
        same = self.memory.data_ptr() == held.data_ptr() and len(held) == len(self.memory)
        return same and self.used == held.shape[-2]

    def taken(self) -> Float[Tensor, "batch heads slots dim"]:
        """The slots that are taken."""
        return self.memory.narrow(-2, 0, self.used)

    def crop(self, held: Float[Tensor, "batch heads slots dim"], slots: int) -> None:
        """Let whoever holds what is `held` go on in place after its first `slots`, if nobody else reads the others."""
        if self.ends(held) and not self.shared:
            self.used = slots


def extend(
    held: Float[Tensor, "batch heads slots dim"] | Float[Tensor, " 0"],
    room: Room | None,
    new: Float[Tensor, "batch heads tokens dim"],
) -> tuple[Float[Tensor, "batch heads all dim"], Room | None]:
    """Append `new` to `held`, without a copy of `held` where its room has space.

    Returns:
        Both together, a view of the room; and the room.
    """
    slots, more = held.shape[-2] if held.dim() == 4 else 0, new.shape[-2]
    # A backward pass may read what a later step would write over; and a small copy takes less time than avoiding it.
    if slots == 0 or torch.is_grad_enabled() or held.numel() < WORTH_A_ROOM:
        # Contiguous: kernels take a fifth longer over the transposed views that projections leave.
        return torch.cat([held, new], dim=-2) if slots else new.contiguous(), None
    together, room = grow(held, room, more)
    together.narrow(-2, slots, more).copy_(new)
    return together, room


def grow(
    held: Float[Tensor, "batch heads slots dim"], room: Room | None, more: int
) -> tuple[Float[Tensor, "batch heads all dim"], Room]:
    """What is held, in room for as many tokens more; and the room."""
    slots = held.shape[-2]
    if room is None or not room.ends(held) or slots + more > room.memory.shape[-2]:
        room = Room(held.new_empty(*held.shape[:2], slots + more + SPARE, held.shape[-1]), slots)
        room.memory.narrow(-2, 0, slots).copy_(held)
    room.used = slots + more
    return room.taken(), room
